"""What the training loop offers to code bound from gin: evaluation, sampling, anything else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from t5x_like.state import Model, Structure


@dataclasses.dataclass(frozen=True)
class Run:
  """The run a hook is called from.

  Attributes:
    model: the model definition.
    structure: graph definition, shapes, mesh and rules.
    loader: the training data.
    workdir: the run's directory.
    steps: updates of the whole run.
    write: records metrics: write(step, {'name': value}).
    message: prints a line beside the progress display.
  """

  model: Model
  structure: Structure
  loader: Any
  workdir: str
  steps: int
  write: Callable[[int, Mapping[str, Any]], None]
  message: Callable[[str], None]


class Hook(Protocol):
  """Called after every update that `due` accepts, with the state of that update.

  The state must not be kept: the next update donates its buffers. An exception ends the run, whose
  state is saved first. A hook may also have `check(model=..., loader=...)`, called before anything
  is compiled or written; it raises ValueError where the hook could not work.
  """

  def due(self, step: int, *, last: bool) -> bool:
    """Whether to call after `step` updates; `last` is true after the final one."""
    ...

  def __call__(self, run: Run, step: int, train_state: Mapping[str, Any]) -> None: ...
