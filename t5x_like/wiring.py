"""What a gin configuration reaches from a function: which bindings take effect, what is missing.

A configuration is a graph. A node is a function or class in a scope; a binding whose value refers
to `@name` is an edge. Knowing the nodes a run can reach, before anything is built, is what lets us
refuse settings that nothing uses and list everything that is missing at once. Follows gin's
scoping: a scoped reference replaces the current scope, a plain one inherits it, and a node in scope
a/b takes the bindings of '', 'a' and 'a/b', the innermost winning. Knows nothing of gin itself.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

MACRO = 'gin.macro'
CONSTANT = 'gin.constant'

Use = Literal['called', 'passed']


class Key(NamedTuple):
  """Names one parameter: the scope it is bound in, its function's full name, and its own."""

  scope: str
  selector: str
  arg: str

  def __str__(self) -> str:
    if self.selector == MACRO:
      return self.scope
    return (f'{self.scope}/' if self.scope else '') + f'{self.selector}.{self.arg}'


class Where(NamedTuple):
  """Where a binding was written."""

  origin: Literal['file', 'command line']
  text: str  # 'runs/pretrain.gin:12', or the flag itself.
  file: str = ''
  within: tuple[str, ...] = ()  # The files that included this one.

  def __str__(self) -> str:
    return self.text


class Binding(NamedTuple):
  """One `key = value` as written."""

  key: Key
  value: Any
  where: Where


class Reference(NamedTuple):
  """A value naming a function: `@scopes/selector()` when called, `@scopes/selector` when not."""

  scopes: tuple[str, ...]
  selector: str
  use: Use


class Node(NamedTuple):
  """A function or class in a scope."""

  scope: tuple[str, ...]
  selector: str


class Walk(NamedTuple):
  """What was reached: nodes with how they are used, and the parameters that take effect there."""

  nodes: Mapping[Node, Use]
  used: frozenset[Key]


# For every parameter, everything written for it, in the order in which it was read.
Written = Mapping[Key, list[Binding]]
References = Callable[[Any], Iterator[Reference]]
Follow = Literal['effective', 'all']


def written(bindings: Iterable[Binding]) -> Written:
  """Groups bindings by parameter, keeping their order."""
  grouped: dict[Key, list[Binding]] = {}
  for binding in bindings:
    grouped.setdefault(binding.key, []).append(binding)
  return grouped


def _by_node(table: Written) -> dict[tuple[str, str], list[Key]]:
  keys: dict[tuple[str, str], list[Key]] = {}
  for key in table:
    keys.setdefault((key.scope, key.selector), []).append(key)
  return keys


def _candidates(node: Node, keys: Mapping[tuple[str, str], list[Key]]) -> Iterator[Key]:
  for i in range(len(node.scope) + 1):
    yield from keys.get(('/'.join(node.scope[:i]), node.selector), [])


def effective(node: Node, table: Written) -> dict[str, Binding]:
  """Returns the binding that takes effect for each bound parameter of a node."""
  return {key.arg: table[key][-1] for key in _candidates(node, _by_node(table))}


def walk(
  roots: Iterable[Node],
  table: Written,
  *,
  references: References,
  follow: Follow = 'effective',
  passed: Iterable[Node] = (),
) -> Walk:
  """Follows references from the roots to everything they can build or call.

  Args:
    roots: where to start; they count as called.
    table: what was written.
    references: finds the references inside a value, however nested.
    follow: only the bindings that take effect, or also those that others have replaced.
    passed: further starts, of functions that others call with arguments of their own.
  """
  keys = _by_node(table)
  selectors = {key.selector for key in table}
  nodes: dict[Node, Use] = {}
  used: set[Key] = set()
  todo: list[tuple[Node, Use]] = [(node, 'passed') for node in passed]
  todo.extend((root, 'called') for root in roots)
  while todo:
    node, use = todo.pop()
    if node in nodes and (nodes[node] == 'called' or use == 'passed'):
      continue
    nodes[node] = use
    found = list(_candidates(node, keys))
    if follow == 'effective':
      found = list({key.arg: key for key in found}.values())
    used.update(found)
    # A class brings its methods: gin writes them as module.Class.method.
    methods = [s for s in selectors if s.startswith(node.selector + '.')]
    todo.extend((Node(node.scope, method), 'passed') for method in methods)
    for key in found:
      bindings = table[key] if follow == 'all' else table[key][-1:]
      for reference in (r for b in bindings for r in references(b.value)):
        scopes = [reference.scopes or node.scope]
        if reference.use == 'passed' and not reference.scopes:
          scopes.append(())  # It may be called later, outside every scope.
        todo.extend((Node(scope, reference.selector), reference.use) for scope in scopes)
  return Walk(nodes, frozenset(used))


def final(
  value: Any, table: Written, *, references: References
) -> Iterator[tuple[Any, Where | None]]:
  """Follows a macro to the value it stands for, yielding each step with where it was written."""
  seen: set[Key] = set()
  where: Where | None = None
  while True:
    yield value, where
    found = list(references(value)) if not isinstance(value, (str, list, tuple, dict)) else []
    if len(found) != 1 or found[0].selector != MACRO:
      return
    key = Key('/'.join(found[0].scopes), MACRO, 'value')
    if key not in table or key in seen:
      return
    seen.add(key)
    value, where = table[key][-1].value, table[key][-1].where


def overwritten_by_include(table: Written) -> list[tuple[Binding, Binding]]:
  """Returns the pairs (lost, winner) where a file's own setting is undone without anyone asking.

  That is a binding written above an include that sets the same parameter, or one set twice in one
  file. A later file or the command line may override an earlier file: that is what they are for.
  """
  lost = []
  for bindings in table.values():
    for before, after in zip(bindings, bindings[1:], strict=False):
      if before.where.file and before.where.file in (after.where.file, *after.where.within):
        lost.append((before, after))
  return lost


def missing(
  reached: Walk,
  table: Written,
  *,
  parameters: Callable[[str], Mapping[str, inspect.Parameter]],
  required: Callable[[Any], bool],
) -> list[tuple[Key, Where | None]]:
  """Lists what has to be given and is not: unbound parameters without default, REQUIRED values.

  Args:
    reached: the nodes of the run.
    table: what was written.
    parameters: the signature of a selector.
    required: whether a value or default is gin's REQUIRED.
  """
  found: dict[Key, Where | None] = {}
  for node, use in reached.nodes.items():
    bound = effective(node, table)
    for binding in bound.values():
      if required(binding.value):
        found[binding.key] = binding.where
    if node.selector in (MACRO, CONSTANT):
      if node.selector == MACRO and not bound:
        found[Key('/'.join(node.scope), MACRO, 'value')] = None
      continue
    for name, parameter in parameters(node.selector).items():
      empty = parameter.default is inspect.Parameter.empty and use == 'called'
      named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
      if named and name not in bound and (empty or required(parameter.default)):
        found[Key('/'.join(node.scope), node.selector, name)] = None
  return sorted(found.items(), key=lambda item: (item[0].selector != MACRO, str(item[0])))
