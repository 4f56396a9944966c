"""Every decoder-only family against its reference: logits, losses, gradients, greedy text."""

import dataclasses
import pathlib

import golden_hf
import jax
import numpy as np
import pytest

from models.hf import family as family_lib
from models.hf import tree
from models.hf.settings import Settings
from partitioning import rules as rules_lib
from t5x_like import decode, losses

NAMES = sorted(path.parent.name for path in pathlib.Path(golden_hf.FOLDER).glob('*/io.npz')
               if 'leftpad_logits' in golden_hf.outputs(path.parent.name))
LANES = [('unroll', 1), ('scan', 8), *(
    pytest.param(*lane, marks=pytest.mark.slow) for lane in (('scan', 1), ('unroll', 8)))]


def _rows(array: np.ndarray, devices: int) -> np.ndarray:
  """Rows repeated until the devices divide them; a mean over them stays what it was."""
  return array if devices == 1 else np.tile(array, (4,) + (1,) * (array.ndim - 1))


def _batch(ids, labels, mask):
  """What `losses.next_token` takes: the logits of a token are compared with the next label."""
  targets = labels[:, 1:]
  return {'inputs': ids[:, :-1], 'targets': np.maximum(targets, 0), 'positions': None,
          'segment_ids': mask[:, :-1], 'loss_weights': (targets >= 0).astype(np.float32)}


def _everything(structure):
  """All numbers of a fixture in one program, which compiles once."""
  def loss(params, batch):
    module = structure.module(params)
    total, weight, _ = losses.next_token(module, batch)
    return total / weight

  def run(params, inputs, batches):
    module = structure.module(params)
    logits = [module(ids, positions=positions, segment_ids=segments)
              for ids, positions, segments in inputs]
    return logits, [jax.value_and_grad(loss)(params, batch) for batch in batches]

  # Unoptimised code is compiled in half the time and computes the same function.
  return jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})


@pytest.mark.parametrize('loop, devices', LANES)
@pytest.mark.parametrize('name', NAMES)
def test_numbers(name, loop, devices):
  io = golden_hf.outputs(name)
  structure = golden_hf.structure(name, devices=devices, layer_loop=loop)
  params = golden_hf.params(name, structure)
  rows = lambda key: _rows(io[key], devices)
  ones = np.ones_like(rows('input_ids'))
  mask = rows('padded_attention_mask')
  batches = [_batch(rows('input_ids'), rows('labels'), ones),
             _batch(rows('padded_input_ids'), rows('padded_labels'), mask)]
  inputs = {'': (rows('input_ids'), None, None), 'padded_': (rows('padded_input_ids'), None, mask),
            'leftpad_': (rows('leftpad_input_ids'), rows('leftpad_position_ids'),
                         rows('leftpad_attention_mask'))}
  with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
    logits, scored = _everything(structure)(
        params, list(inputs.values()), batches)
  for found, prefix in zip(logits, inputs, strict=True):
    if prefix:
      found = np.where(rows(f'{prefix}attention_mask')[..., None] > 0, np.asarray(found), 0)
    golden_hf.close(found, rows(f'{prefix}logits'), prefix)
  for (loss, grads), prefix in zip(scored, ('', 'padded_'), strict=True):
    np.testing.assert_allclose(loss, io[f'{prefix}loss'], rtol=golden_hf.OF_LOSS)
    golden_hf.gradients_close(name, structure, grads, prefix)


@pytest.mark.parametrize('name', NAMES)
def test_greedy_continuation(name):
  io = golden_hf.outputs(name)
  structure = golden_hf.structure(name, layer_loop='scan')
  definition = golden_hf.family(name).model(config=golden_hf.config(name))
  generator = decode.Generator(structure, definition, sampling=decode.Sampling(temperature=0))
  params = golden_hf.params(name, structure)
  masks = {'gen': np.ones_like(io['gen_prompt_ids']), 'genpad': io['genpad_attention_mask']}
  # Rows of all lengths together, which compiles once.
  prompts = [ids[m > 0].tolist() for prefix, mask in masks.items()
             for ids, m in zip(io[f'{prefix}_prompt_ids'], mask, strict=True)]
  wanted = [row for prefix in masks for row in io[f'{prefix}_new_ids'].tolist()]
  assert generator(params, prompts, new_tokens=len(wanted[0])) == wanted


@pytest.mark.parametrize('name', NAMES)
def test_settings_in_both_spellings_and_back(name):
  family = golden_hf.family(name)
  read = golden_hf.settings(name)
  config = family.read(read)
  assert not read.unread()
  older = pathlib.Path(golden_hf.FOLDER / name / 'config_v4.json')
  if older.exists():
    assert family.read(golden_hf.settings(name, older.name)) == config
  written = family.write(config)
  assert family.read(Settings(written)) == config
  assert family.read(Settings(family.older(written))) == config
  assert family in family_lib.of_config(dataclasses.replace(config, layer_loop='unroll'))


@pytest.mark.parametrize('name', NAMES)
def test_export_returns_the_same_bytes(name):
  structure, family = golden_hf.structure(name), golden_hf.family(name)
  flat = tree.from_tensors(family, golden_hf.config(name), golden_hf.leaves(structure),
                           golden_hf.stored(name))
  stored = golden_hf.stored(name)
  dtype = next(s.dtype for s in stored.values() if s.dtype in tree.FLOATS)
  made = dict(tree.to_tensors(family, golden_hf.config(name), golden_hf.leaves(structure),
                              lambda path, index: flat[path][index], dtype=dtype))
  assert made.keys() == stored.keys()
  for key, value in made.items():
    assert value.shape == stored[key].shape and value.tobytes() == stored[key].read().tobytes()
