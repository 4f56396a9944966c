"""Refuses what gin passes in silence: settings without effect, missing ones, wrong types."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from t5x_like import annotations, names, wiring


class Program(NamedTuple):
  """A configuration and the function it is for.

  Attributes:
    table: everything written, by parameter.
    root: the function to be called.
    others: further entry points that the files wire up; they are for other commands.
    anywhere: functions that carry gin's own decorator, so may be called from anywhere.
    given: names of the root's parameters that come from flags.
    references: finds the references in a value.
    function: the function or class behind a full name.
    required: whether a value is gin's REQUIRED.
  """

  table: wiring.Written
  root: wiring.Node
  others: tuple[wiring.Node, ...]
  anywhere: tuple[wiring.Node, ...]
  given: frozenset[str]
  references: wiring.References
  function: Callable[[str], Any]
  required: Callable[[Any], bool]

  def run(self, follow: wiring.Follow = 'effective') -> wiring.Walk:
    """Returns what the run reaches."""
    return wiring.walk(
      [self.root], self.table, references=self.references, follow=follow, passed=self.anywhere
    )

  def elsewhere(self, follow: wiring.Follow = 'effective') -> wiring.Walk:
    """Returns what the other entry points reach."""
    return wiring.walk(self.others, self.table, references=self.references, follow=follow)

  def parameters(self, selector: str) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function or class that can be bound."""
    try:
      return inspect.signature(self.function(selector)).parameters
    except (ValueError, TypeError):  # Written in C, without a signature.
      return {}


def check(program: Program) -> list[str]:
  """Checks a whole configuration and returns notes on settings that others have displaced.

  Raises:
    ValueError: all that is wrong, one line each.
  """
  reached = program.run()
  problems = [
    *_overwritten(program),
    *_without_effect(program, reached),
    *_wrong_types(program, reached),
    *_missing(program, reached),
  ]
  if len(problems) == 1:
    raise ValueError(problems[0])
  if problems:
    raise ValueError(
      f'{len(problems)} problems in the configuration:\n' + '\n'.join(f'  {p}' for p in problems)
    )
  return _displaced(program, reached)


def _overwritten(program: Program) -> Iterator[str]:
  for before, after in wiring.overwritten_by_include(program.table):
    fix = (
      'remove one of them' if before.where.file == after.where.file else 'put the include above it'
    )
    yield f'{before.where}: {before.key} has no effect, {after.where} sets it again; {fix}'


def _unused(program: Program, reached: wiring.Walk) -> Iterator[wiring.Binding]:
  for key, bindings in program.table.items():
    if key not in reached.used:
      yield bindings[-1]


def _reachable_before_overrides(program: Program) -> frozenset[wiring.Key]:
  return program.run('all').used


def _without_effect(program: Program, reached: wiring.Walk) -> Iterator[str]:
  elsewhere = program.elsewhere('all').used
  displaced = _reachable_before_overrides(program)
  for binding in _unused(program, reached):
    from_file = binding.where.origin == 'file'
    if from_file and (binding.key in elsewhere or binding.key in displaced):
      continue
    if binding.key.selector == wiring.MACRO:
      known = [k.scope for k in (*displaced, *elsewhere) if k.selector == wiring.MACRO]
      known += [s for s in _macros_referred_to(program)]
      why = f'nothing uses the macro {binding.key.scope}'
      if binding.key.scope in known:
        why = (
          f'{binding.key.scope} has no effect: nothing that {program.root.selector} runs uses it'
        )
      yield f'{binding.where}: {why}{names.suggest(binding.key.scope, known)}'
    else:
      yield (
        f'{binding.where}: {binding.key} has no effect: nothing that {program.root.selector} '
        f'runs uses it{_nearest_use(binding.key, reached)}'
      )


def _nearest_use(key: wiring.Key, reached: wiring.Walk) -> str:
  scopes = {'/'.join(n.scope) for n in reached.nodes if n.selector == key.selector}
  if scopes:
    shown = ', '.join(repr(s) if s else 'no scope' for s in sorted(scopes))
    return f'; {key.selector} is used in: {shown}'
  return f'; bind a parameter to @{key.selector} or remove it'


def _macros_referred_to(program: Program) -> set[str]:
  return {
    '/'.join(r.scopes)
    for bindings in program.table.values()
    for b in bindings
    for r in program.references(b.value)
    if r.selector == wiring.MACRO
  }


def _displaced(program: Program, reached: wiring.Walk) -> list[str]:
  """Lists what the user's own files set for something that a later setting has replaced.

  Files that come in by an include set defaults; replacing those is how files are combined.
  """
  displaced = _reachable_before_overrides(program)
  return [
    f'{b.key} ({b.where})'
    for b in _unused(program, reached)
    if b.where.origin == 'file' and not b.where.within and b.key in displaced
  ]


def _wrong_types(program: Program, reached: wiring.Walk) -> Iterator[str]:
  told = set()
  for node in reached.nodes:
    if node.selector in (wiring.MACRO, wiring.CONSTANT, 'gin.singleton'):
      continue
    hints = annotations.hints(program.function(node.selector))
    parameters = program.parameters(node.selector)
    for arg, binding in wiring.effective(node, program.table).items():
      default = parameters[arg].default if arg in parameters else inspect.Parameter.empty
      if arg not in hints or binding.key in told:
        continue
      *_, (value, where) = wiring.final(binding.value, program.table, references=program.references)
      if program.required(value) or (value is None and default is None):
        continue
      value = _stand_in(value, program)
      if type(value) is type(default) and value == default:
        continue  # What the code itself uses is right by definition.
      if annotations.fits(value, hints[arg]) == 'no':
        told.add(binding.key)
        yield _type_message(binding, value, where or binding.where, hints[arg])


def _stand_in(value: Any, program: Program) -> Any:
  """Replaces references inside a value by what is known about them."""
  if isinstance(value, dict):
    return {k: _stand_in(v, program) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_stand_in(v, program) for v in value)
  for reference in [] if isinstance(value, str) else program.references(value):
    if reference.selector == wiring.MACRO:
      key = wiring.Key('/'.join(reference.scopes), wiring.MACRO, 'value')
      bound = program.table.get(key)
      return _stand_in(bound[-1].value, program) if bound else annotations.Built(reference.selector)
    if reference.use == 'called':
      made = annotations.returned(program.function(reference.selector))
      return annotations.Built(reference.selector, made)
    return annotations.Unbuilt(reference.selector, program.function(reference.selector))
  return value


def _type_message(binding: wiring.Binding, value: Any, where: wiring.Where, hint: Any) -> str:
  taken = f'{binding.key} takes {annotations.describe(hint)}, but got {value!r}'
  if isinstance(value, annotations.Unbuilt):
    fix = f'; to pass what it builds, write {value!r}()'
  elif (
    isinstance(value, float) and value.is_integer() and annotations.fits(int(value), hint) == 'yes'
  ):
    fix = f'; write {int(value)}'
  elif isinstance(value, list) and annotations.fits(tuple(value), hint) == 'yes':
    fix = f'; write {tuple(value)}'
  elif isinstance(value, str):
    fix = names.suggest(value, annotations.choices(hint))
  else:
    fix = ''
  return f'{where}: {taken}{fix}'


def _missing(program: Program, reached: wiring.Walk) -> Iterator[str]:
  absent = wiring.missing(
    reached, program.table, parameters=program.parameters, required=program.required
  )
  for key, where in absent:
    if key.selector == program.root.selector and key.arg in program.given:
      continue
    if key.selector != wiring.MACRO:
      at = f'{where}: ' if where else ''
      yield (
        f'{at}{key} is required and not set; bind it in a gin file or with --gin.{_short(key)}=...'
      )
      continue
    users = [
      b
      for bindings in program.table.values()
      for b in bindings[-1:]
      if any(
        r.selector == wiring.MACRO and '/'.join(r.scopes) == key.scope
        for r in program.references(b.value)
      )
    ]
    use = f' by {users[0].key} ({users[0].where})' if users else ''
    if where:
      yield f'{where}: {key} is required{use} and not set; give it with --gin.{key}=...'
    else:
      known = [k.scope for k in program.table if k.selector == wiring.MACRO]
      yield f'the macro {key} is used{use} but never set{names.suggest(key.scope, known)}'


def _short(key: wiring.Key) -> str:
  """Returns a parameter's name as a binding writes it: from the module on."""
  return (f'{key.scope}/' if key.scope else '') + '.'.join([*key.selector.split('.')[-2:], key.arg])


def check_distinct(arguments: Mapping[str, Any]) -> None:
  """Refuses things of one list that are called the same, since they would write the same names.

  Args:
    arguments: what the entry point is about to be given, built.

  Raises:
    ValueError: two entries of a list are of the same class, unequal, and have the same `name`.
  """
  for argument, value in arguments.items():
    seen: dict[Any, Any] = {}
    for entry in value if isinstance(value, (list, tuple)) else ():
      key = (type(entry), getattr(entry, 'name', None))
      if isinstance(key[1], str) and seen.setdefault(key, entry) != entry:
        kind = type(entry).__name__
        bound = f'{type(entry).__module__.rpartition(".")[2]}.{kind}'
        raise ValueError(
          f'{argument} holds two {kind} named {key[1]!r}, which would write under the same names; '
          f'give each its own, as in `second/{bound}.name = {key[1] + "_second"!r}` with '
          f'`@second/{bound}()` in the list'
        )


def is_entry(function: Callable[..., Any]) -> bool:
  """Says whether a function is handed to `config.run` by its own module: a command of its own."""
  module = sys.modules.get(getattr(function, '__module__', ''))
  try:
    source = inspect.getsource(module) if module else ''
  except (OSError, TypeError):
    return False
  name = re.escape(f'{function.__module__}.{function.__qualname__}')
  return re.search(rf'config\.run\(\s*[\'"]{name}[\'"]', source) is not None
