"""A user's package, known to nobody here."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

CALLS = []


@dataclasses.dataclass(frozen=True)
class Model:
  width: int
  depth: int = 2
  kind: Literal['gpt', 'llama'] = 'gpt'
  windows: tuple[int, ...] = (1, 2)


class Loader:
  def __init__(self, *, batch_size: int = 8, sources: Sequence[str] = ('a',), rate: float = 1.0):
    self.batch_size, self.sources, self.rate = batch_size, sources, rate


def cosine(*, peak: float = 0.1, warmup: int = 3) -> Callable[[int], float]:
  return lambda step: peak


def adamw(*, learning_rate: Callable[[int], float], b2: float = 0.95) -> tuple:
  return ('adamw', learning_rate(0), b2)


def lion(*, learning_rate: Callable[[int], float], beta: float = 0.9) -> tuple:
  return ('lion', learning_rate(0), beta)


def hook(step: int, *, every: int = 10):
  return (step, every)


def train(
  *,
  model: Model,
  optimizer: tuple,
  steps: int,
  loader: Loader | None = None,
  hooks: Sequence[Callable] = (),
  name: str = 'run',
  eval_loader: Loader | None = None,
  options: Mapping[str, float] | None = None,
  step: int | None = None,
):
  """Not a trainer: it says what it was given."""
  hooks = [h(steps) for h in hooks]
  CALLS.append(dict(locals()))
  return CALLS[-1]


def dry_run(**arguments):
  CALLS.append({'dry': arguments})


def fails(*, steps: int = 1):
  raise ValueError(f'steps={steps} is one too many')
