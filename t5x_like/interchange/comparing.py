"""Our logits beside those of transformers: of an import, and of what we export."""

import dataclasses
import importlib
import inspect
import os
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import checkpoints
from t5x_like import state as state_lib
from t5x_like.interchange import exporting, folder

ABSOLUTE, RELATIVE = 1e-4, 1e-5
_ROWS, _LENGTH, _SEED = 2, 24, 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """How far logits are from the reference's.

  Attributes:
    largest: of the absolute differences.
    excess: of |difference| - (ABSOLUTE + RELATIVE x |reference|); within the bound up to 0.
  """

  largest: float
  excess: float


class Batch(NamedTuple):
  """Arguments of both models, and the places whose logits are compared.

  Attributes:
    ours: arrays by our names.
    theirs: the same by theirs.
    real: [B, L] 1 where a token is, 0 for padding.
  """

  ours: dict[str, np.ndarray]
  theirs: dict[str, np.ndarray]
  real: np.ndarray


def difference(found: np.ndarray, wanted: np.ndarray) -> Difference:
  """Compares logits.

  Args:
    found: ours.
    wanted: the reference's, of the same shape.
  """
  apart = np.abs(found.astype(np.float64) - wanted)
  excess = apart - (ABSOLUTE + RELATIVE * np.abs(wanted))
  # NaN is no number, so it is beyond every bound.
  return Difference(largest=float(apart.max()),
                    excess=float(np.where(np.isnan(excess), np.inf, excess).max()))


def verify(hf_dir: str, checkpoint: str, *, step: int | None = None) -> dict[str, Difference]:
  """Compares, in float32, on made-up tokens; prints the largest differences.

  Args:
    hf_dir: the folder in Hugging Face format.
    checkpoint: directory of checkpoints that should be the same model.
    step: which of them; None takes the newest.
  Returns:
    'import': our logits, and 'export': those of transformers from our export, both against
    transformers' own from `hf_dir`.
  Raises:
    ValueError: transformers is not installed, or lacks the model.
    SystemExit: with status 1, where a difference is beyond the bound.
  """
  torch, transformers = _libraries()
  found = folder.load(hf_dir, 'ignore')
  name = found.family.architectures.get(found.values['model_type'], found.family.architecture)
  kind = getattr(transformers, name, None)
  if kind is None:
    raise ValueError(f'transformers {transformers.__version__} has no {name}, which '
                     f'{found.family.name} is compared with')
  model = found.family.model(config=folder.computing_in('float32', found.config))
  batch = made_up(model.config, start=found.values.get('decoder_start_token_id') or 0)
  wanted = _theirs(found.path, kind, torch, batch)
  compared = {'import': difference(_ours(model, checkpoint, step, batch), wanted)}
  with tempfile.TemporaryDirectory(prefix='verify-') as place:
    again = exporting.export(checkpoint, out=os.path.join(place, 'export'), step=step,
                             model=model, family=found.family.name)
    compared['export'] = difference(_theirs(again, kind, torch, batch), wanted)
  for name, one in compared.items():
    print(f'{name}: largest difference {one.largest:.3g} of logits up to {np.abs(wanted).max():.3g}'
          f', {"within" if one.excess <= 0 else "BEYOND"} {ABSOLUTE} + {RELATIVE} x |logit|')
  if any(one.excess > 0 for one in compared.values()):
    raise SystemExit(1)
  return compared


def _libraries() -> tuple[Any, Any]:
  try:
    return importlib.import_module('torch'), importlib.import_module('transformers')
  except ImportError as error:
    raise ValueError(f'verify compares with transformers, which is not installed here ({error}); '
                     f'run it where it is: pip install torch transformers') from None


def made_up(config: Any, *, start: int = 0) -> Batch:
  """Tokens to compare a model on: a whole row, and where it sees both ways one with padding.

  Args:
    config: of a decoder, an encoder or both.
    start: token that a decoder which reads an encoder begins with.
  """
  draw = np.random.default_rng(_SEED)
  stack = getattr(config, 'stack', getattr(config, 'decoder', config))
  longest = getattr(config, 'longest', stack.max_length)
  length = min(_LENGTH, longest)
  ids = lambda length: draw.integers(min(3, stack.vocab - 1), stack.vocab, (_ROWS, length))
  tokens, real = ids(length), np.ones((_ROWS, length), np.int64)
  if config is stack:
    return Batch({'inputs': tokens}, {'input_ids': tokens}, real)
  real[-1, length - length // 4:] = 0
  if stack is not getattr(config, 'stack', None):
    written = ids(length // 2)
    written[:, 0] = start
    return Batch({'encoder_inputs': tokens, 'inputs': written, 'encoder_segment_ids': real},
                 {'input_ids': tokens, 'decoder_input_ids': written, 'attention_mask': real},
                 np.ones_like(written))
  ours = {'inputs': tokens, 'segment_ids': real}
  theirs = {'input_ids': tokens, 'attention_mask': real}
  if config.types:
    ours['types'] = theirs['token_type_ids'] = draw.integers(0, config.types, tokens.shape)
  return Batch(ours, theirs, real)


def _ours(model: Any, checkpoint: str, step: int | None, batch: Batch) -> np.ndarray:
  structure = state_lib.describe(model, mesh_lib.make_mesh(devices=1), rules_lib.data_parallel())
  params = checkpoints.load_params(checkpoint, structure.shapes, step=step, which='evaluated')
  run = jax.jit(lambda params, given: structure.module(params)(**given))
  with (jax.set_mesh(structure.mesh), rules_lib.use(structure.rules),
        jax.default_matmul_precision('highest')):
    logits = run(params, {name: x.astype(np.int32) for name, x in batch.ours.items()})
  return np.asarray(logits)[batch.real > 0]


def _theirs(path: str, kind: Any, torch: Any, batch: Batch) -> np.ndarray:
  model = kind.from_pretrained(path, attn_implementation='eager').float().eval()
  given = {name: torch.tensor(x) for name, x in batch.theirs.items()}
  if 'use_cache' in inspect.signature(kind.forward).parameters:
    given['use_cache'] = False
  with torch.no_grad():
    return model(**given).logits.numpy()[batch.real > 0]
