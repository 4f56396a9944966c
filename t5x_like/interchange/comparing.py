"""Our logits beside those of transformers: of an import, and of what we export."""

import dataclasses
import importlib
import inspect
import os
import tempfile
from typing import Any

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
    ValueError: transformers is not installed, or the model is one of two stacks.
    SystemExit: with status 1, where a difference is beyond the bound.
  """
  torch, transformers = _libraries()
  found = folder.load(hf_dir, 'ignore')
  kind = getattr(transformers, found.family.architecture, None)
  if kind is None:
    raise ValueError(f'transformers {transformers.__version__} has no '
                     f'{found.family.architecture}, which {found.family.name} is compared with')
  if 'decoder_input_ids' in inspect.signature(kind.forward).parameters:
    raise ValueError(f'{found.family.name} has an encoder and a decoder; verify compares models of '
                     f'one stack')
  config = folder.computing_in('float32', found.config)
  stack = getattr(config, 'stack', config)
  length = min(_LENGTH, stack.max_length)
  ids = np.random.default_rng(_SEED).integers(min(3, stack.vocab - 1), stack.vocab,
                                              (_ROWS, length)).astype(np.int32)
  wanted = _theirs(found.path, kind, torch, ids)
  compared = {'import': difference(_ours(found.family.model(config=config), checkpoint, step, ids),
                                   wanted)}
  with tempfile.TemporaryDirectory(prefix='verify-') as place:
    again = exporting.export(checkpoint, out=os.path.join(place, 'export'), step=step,
                             model=found.family.model(config=config), family=found.family.name)
    compared['export'] = difference(_theirs(again, kind, torch, ids), wanted)
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


def _ours(model: Any, checkpoint: str, step: int | None, ids: np.ndarray) -> np.ndarray:
  structure = state_lib.describe(model, mesh_lib.make_mesh(devices=1), rules_lib.data_parallel())
  params = checkpoints.load_params(checkpoint, structure.shapes, step=step, which='evaluated')
  with (jax.set_mesh(structure.mesh), rules_lib.use(structure.rules),
        jax.default_matmul_precision('highest')):
    return np.asarray(jax.jit(lambda params, ids: structure.module(params)(ids))(params, ids))


def _theirs(path: str, kind: Any, torch: Any, ids: np.ndarray) -> np.ndarray:
  model = kind.from_pretrained(path, attn_implementation='eager').float().eval()
  with torch.no_grad():
    return model(input_ids=torch.tensor(ids.astype(np.int64)), use_cache=False).logits.numpy()
