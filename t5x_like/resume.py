"""Going on from a checkpoint, and noticing that it is no longer the same run."""

import base64
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from t5x_like import checkpoints
from t5x_like import state as state_lib
from t5x_like import step as step_lib

# They change how a model is computed or checked, not what it computes from equal parameters.
_EXECUTION = ('layer_loop', 'remat', 'kernel', 'max_length')


def definition(model: state_lib.Model) -> dict[str, str]:
  """Returns what a model computes as far as its shapes do not show it; {} where that is unknown.

  Args:
    model: the model definition; its `config`, or itself, must be a dataclass to be described.
  """
  config: Any = getattr(model, 'config', model)
  if not dataclasses.is_dataclass(config):
    return {}
  found = {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)
           if field.name not in _EXECUTION}
  # A default repr holds an address, which is another one in every process.
  found = {name: text for name, text in found.items() if ' at 0x' not in text}
  return {'class': type(model).__qualname__, **found}


def newest(checkpointer: checkpoints.Checkpointer, abstract: Any, *, extra: Mapping[str, Any],
           loader: step_lib.Loader, data_change: str, model_change: str) -> tuple[int, Any] | None:
  """Restores the newest good state, if there is one, and the position of a live loader.

  Args:
    checkpointer: of the run.
    abstract: the train state without arrays.
    extra: what this run writes into its checkpoints: 'data', 'seed' and 'model'.
    loader: gets its position back, where it has one and reads what the checkpoint's did.
    data_change: 'refuse' or 'allow' other data.
    model_change: 'refuse' or 'allow' a model that computes something else.
  Returns:
    The updates done and the state; None where there is no checkpoint.
  Raises:
    ValueError: a change that is not allowed, or no usable checkpoint.
  """
  found = checkpointer.restore(abstract)
  if found is None:
    return None
  start, train_state, saved = found
  same_data = saved.get('data') == extra['data']
  if not same_data and data_change == 'refuse':
    raise ValueError(
        f'the checkpoint at update {start} was trained on other data or another order '
        f'({str(saved.get("data"))[:12]}, now {extra["data"][:12]}); start a new run '
        f'from its weights with train.initial, or set train.data_change = \'allow\'')
  changes = _changes(saved.get('model', {}), extra['model'])
  if changes and model_change == 'refuse':
    raise ValueError(
        f'the checkpoint at update {start} is of a model that computes something else: '
        f'{", ".join(changes)}; set that back, start a new run from its weights with '
        f'train.initial, or set train.model_change = \'allow\'')
  if saved.get('seed', extra['seed']) != extra['seed']:
    print(f'note: up to update {start} train.seed was {saved["seed"]}, from here on it is '
          f'{extra["seed"]}: dropout is drawn differently, the parameters were not drawn anew',
          file=sys.stderr)
  restore = getattr(loader, 'restore', None)
  if 'loader_state' in saved and same_data and restore is not None:
    restore(base64.b64decode(saved['loader_state']))
  return start, train_state


def _changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  # A setting that only one of them knows came or went with the code, not with the run.
  return [f'{name} was {saved[name]}, now {now[name]}' for name in sorted(saved.keys() & now.keys())
          if saved[name] != now[name]]
