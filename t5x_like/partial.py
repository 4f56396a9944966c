"""Starting a model from parts of another: parameters assigned by name, each accounted for.

As T5X's partial restores: rules name what comes from where; nothing is taken or left out in
silence.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from t5x_like import checkpoints, integrity
from t5x_like import state as state_lib


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one parameter.

  Attributes:
    path: of the parameter in the model.
    how: 'restored', 'initialised' (no rule or no source), or 'refused' (another shape).
    source: name in the checkpoint, '' where there is none.
    why: for what was not restored.
  """

  path: str
  how: Literal['restored', 'initialised', 'refused']
  source: str = ''
  why: str = ''

  def __str__(self) -> str:
    return ' '.join(filter(None, (f'{self.how:<11}', self.path, self.source and f'<- {self.source}',
                                  self.why and f'({self.why})')))


def plan(wanted: Mapping[str, Any], saved: Mapping[str, Sequence[int]],
         rules: Sequence[tuple[str, str | None]]) -> list[Outcome]:
  """Decides for each parameter where it comes from.

  Args:
    wanted: the model's parameters by path, with shapes.
    saved: shapes of the checkpoint's parameters by path.
    rules: (regex of the model's path, its name in the checkpoint with \\\\1 for groups, or None to
      initialise it); the first that matches the whole path decides.
  Returns:
    One outcome per parameter, in their order.
  Raises:
    ValueError: a rule matches no parameter, so would have no effect.
  """
  outcomes, used = [], set()
  for path, leaf in wanted.items():
    number, match = next(((i, m) for i, (pattern, _) in enumerate(rules)
                          if (m := re.fullmatch(pattern, path))), (-1, None))
    used.add(number)
    source = None if match is None else rules[number][1]
    if match is None or source is None:
      why = 'no rule matches' if match is None else 'as its rule says'
      outcomes.append(Outcome(path, 'initialised', why=why))
      continue
    source = _expand(match, source)
    if source not in saved:
      outcomes.append(Outcome(path, 'initialised', source, 'not in the checkpoint'))
    elif tuple(saved[source]) != tuple(leaf.shape):
      outcomes.append(Outcome(path, 'refused', source, f'{list(saved[source])} there, '
                                                       f'{list(leaf.shape)} here'))
    else:
      outcomes.append(Outcome(path, 'restored', source))
  idle = [rules[i][0] for i in range(len(rules)) if i not in used]
  if idle:
    raise ValueError(f'rules without effect, since no parameter is left for them: {idle}; there '
                     f'are {", ".join(wanted)}')
  return outcomes


def _expand(match: re.Match[str], source: str) -> str:
  try:
    return match.expand(source)
  except (re.error, IndexError) as error:
    raise ValueError(f'rule ({match.re.pattern!r}, {source!r}): {error}; groups of the first are '
                     f'numbered from 1') from None


def _checked(rules: Any) -> list[tuple[str, str | None]]:
  """Rules that are pairs of a regex and a name."""
  wanted = "a list of (regex of the model's path, name in the checkpoint or None)"
  if isinstance(rules, str):
    raise ValueError(f'Partial rules={rules!r}: must be {wanted}')
  for rule in rules:
    if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)
            and (rule[1] is None or isinstance(rule[1], str))):
      raise ValueError(f'Partial rules: {rule!r} is no rule; they are {wanted}')
    try:
      re.compile(rule[0])
    except re.error as error:
      raise ValueError(f'Partial rules: {rule[0]!r} is no regex: {error}') from None
  return [(pattern, source) for pattern, source in rules]


class Partial:
  """Parameters of a checkpoint for a model that is not quite its own; see `plan`."""

  def __init__(self, *, checkpoint: str, rules: Sequence[tuple[str, str | None]] = (
      ('(.*)', r'\1'),), step: int | None = None,
               which: Literal['params', 'ema', 'evaluated'] = 'params',
               refused: Literal['stop', 'initialise'] = 'stop'):
    """Makes the restore; nothing is read yet.

    Args:
      checkpoint: directory of checkpoints, imported or of a run, or one of them.
      rules: see `plan`; by default every parameter has the name it has there.
      step: which checkpoint; None takes the newest good one.
      which: the trained weights, their average, or ('evaluated') the average if there is one.
      refused: whether a parameter of another shape stops the run or is initialised.
    """
    if which not in ('params', 'ema', 'evaluated'):
      raise ValueError(f"Partial which={which!r}: allowed are 'params', 'ema' and 'evaluated'")
    if refused not in ('stop', 'initialise'):
      raise ValueError(f"Partial refused={refused!r}: allowed are 'stop' and 'initialise'")
    self.checkpoint, self.step, self.which, self.refused = checkpoint, step, which, refused
    self.rules = _checked(rules)

  def __call__(self, params: Any) -> Any:
    """Fills parameters in, and tells of each what became of it.

    Args:
      params: initialised arrays; those not restored stay as they are.
    Returns:
      A tree like `params`, on its shardings.
    Raises:
      ValueError: a shape differs, a rule has no effect, nothing is restored, or no checkpoint.
    """
    wanted = state_lib.path_dict(params)
    path, root, tensors = self._source()
    saved = {name.partition('/')[2]: tensor['shape'] for name, tensor in tensors.items()
             if name.startswith(f'{root}/')}
    outcomes = plan(wanted, saved, self.rules)
    if jax.process_index() == 0:
      print('\n'.join(map(str, outcomes)), file=sys.stderr)
      left = sorted(saved.keys() - {one.source for one in outcomes if one.how == 'restored'})
      if left:
        print(f'not used of {path}: {", ".join(left)}', file=sys.stderr)
    refused = [str(o) for o in outcomes if o.how == 'refused']
    if refused and self.refused == 'stop':
      raise ValueError(f'{path}: parameters of another shape; give each a rule with None, or set '
                       "refused = 'initialise':\n  " + '\n  '.join(refused))
    restored = [o for o in outcomes if o.how == 'restored']
    if not restored:
      raise ValueError(f'{path}: no rule restores anything; it has {", ".join(saved)}')
    filled = dict(wanted)
    try:
      # One at a time: several parameters may come from the same one.
      for one in restored:
        name = f'{root}/{one.source}'
        filled[one.path] = checkpoints.load_tensors(path, {name: wanted[one.path]}, tensors)[name]
    except integrity.Damaged as error:
      raise ValueError(f'checkpoint {path} is damaged: {error}') from None
    return integrity.nest(filled)

  def _source(self) -> tuple[str, str, dict[str, Any]]:
    """The checkpoint, the tree in it, and all that it holds."""
    directory, step = str(self.checkpoint).rstrip('/'), self.step
    parent, _, last = directory.rpartition('/')
    if step is None and last.isdigit() and int(last) in checkpoints.steps(parent or '.'):
      directory, step = parent or '.', int(last)
    steps = checkpoints.steps(directory)
    if not steps or (step is not None and step not in steps):
      wanted = '' if step is None else f' of step {step}'
      raise ValueError(f'no complete checkpoint{wanted} in {directory}; there are '
                       f'{steps or "none"}')
    path = f'{directory}/{steps[-1] if step is None else step}'
    try:
      tensors = checkpoints.read_manifest(path)['tensors']
    except integrity.Damaged as error:
      raise ValueError(f'checkpoint {path} is damaged: {error}') from None
    roots = {name.split('/')[0] for name in tensors}
    order = {'params': ('params',), 'ema': ('ema',), 'evaluated': ('ema', 'params')}[self.which]
    root = next((root for root in order if root in roots), None)
    if root is None:
      raise ValueError(f'{path} has no {" or ".join(order)}; it has {", ".join(sorted(roots))}')
    return path, root, tensors
