"""BERT, RoBERTa and T5 against their references: logits, losses, gradients, greedy text."""

import dataclasses
import json
import pathlib

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import encoder
from models.hf import family as family_lib
from models.hf import files, tree
from models.hf.settings import Settings
from partitioning import rules as rules_lib
from t5x_like import decode, losses, state

WRITING = ('t5_v1_0', 't5_v1_1')
MASKED = ('bert_mlm', 'roberta_mlm')
LANES = [('unroll', 1), ('scan', 8), *(
    pytest.param(*lane, marks=pytest.mark.slow) for lane in (('scan', 1), ('unroll', 8)))]


def _rows(array: np.ndarray, devices: int) -> np.ndarray:
  """Rows repeated until the devices divide them; a mean over them stays what it was."""
  return array if devices == 1 else np.tile(array, (4,) + (1,) * (array.ndim - 1))


def _labelled(labels: np.ndarray) -> dict[str, np.ndarray]:
  return {'targets': np.maximum(labels, 0), 'loss_weights': (labels >= 0).astype(np.float32)}


def _mean(loss, structure):
  """A loss as a function of parameters and batch, per unit of weight."""
  def run(params, batch):
    total, weight, _ = loss(structure.module(params), batch)
    return total / weight
  return run


@pytest.mark.parametrize('loop, devices', LANES)
@pytest.mark.parametrize('name', MASKED)
def test_masked_numbers(name, loop, devices):
  io = golden_hf.outputs(name)
  structure = golden_hf.structure(name, devices=devices, layer_loop=loop)
  params = golden_hf.params(name, structure)
  rows = lambda key: _rows(io[key], devices)
  batch = {'inputs': rows('input_ids'), 'types': rows('token_type_ids'), 'positions': None,
           'segment_ids': None, **_labelled(rows('labels'))}

  def everything(params, batch, padded):
    module = structure.module(params)
    logits = module(batch['inputs'], types=batch['types'])
    return (logits, module(padded[0], segment_ids=padded[1], types=padded[2]),
            jax.value_and_grad(_mean(losses.masked_lm, structure))(params, batch))

  with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
    logits, padded, (loss, grads) = jax.jit(everything)(
        params, batch, [rows(f'padded_{k}') for k in ('input_ids', 'attention_mask',
                                                      'token_type_ids')])
  golden_hf.close(logits, rows('logits'), 'logits')
  real = rows('padded_attention_mask')[..., None] > 0
  golden_hf.close(np.where(real, padded, 0), np.where(real, rows('padded_logits'), 0), 'padded')
  np.testing.assert_allclose(loss, io['loss'], rtol=golden_hf.OF_LOSS)
  golden_hf.gradients_close(name, structure, grads)


def _written(rows, prefix: str = '', mask=None) -> dict:
  """A batch for `losses.sequence_to_sequence`."""
  return {'encoder_inputs': rows(f'{prefix}input_ids'), 'encoder_positions': None,
          'encoder_segment_ids': mask, 'inputs': rows(f'{prefix}decoder_input_ids'),
          'positions': None, 'segment_ids': None, **_labelled(rows(f'{prefix}labels'))}


@pytest.mark.parametrize('loop, devices', LANES)
@pytest.mark.parametrize('name', WRITING)
def test_written_numbers(name, loop, devices):
  io = golden_hf.outputs(name)
  structure = golden_hf.structure(name, devices=devices, layer_loop=loop)
  params = golden_hf.params(name, structure)
  rows = lambda key: _rows(io[key], devices)
  whole = _written(rows)
  padded = _written(rows, 'padded_', rows('padded_attention_mask'))

  def everything(params, whole, padded):
    module = structure.module(params)
    logits = [module(b['encoder_inputs'], b['inputs'],
                     encoder_segment_ids=b['encoder_segment_ids']) for b in (whole, padded)]
    scored = [jax.value_and_grad(_mean(losses.sequence_to_sequence, structure))(params, b)
              for b in (whole, padded)]
    return logits, module.encode(whole['encoder_inputs']), scored

  with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
    logits, states, scored = jax.jit(everything)(params, whole, padded)
  golden_hf.close(logits[0], rows('logits'), 'logits')
  golden_hf.close(states, rows('encoder_last_hidden_state'), 'encoder')
  real = rows('padded_decoder_mask')[..., None] > 0
  golden_hf.close(np.where(real, logits[1], 0), np.where(real, rows('padded_logits'), 0), 'padded')
  for (loss, grads), prefix in zip(scored, ('', 'padded_'), strict=True):
    np.testing.assert_allclose(loss, io[f'{prefix}loss'], rtol=golden_hf.OF_LOSS)
    golden_hf.gradients_close(name, structure, grads, prefix)


@pytest.mark.parametrize('name', WRITING)
def test_greedy_text(name):
  io = golden_hf.outputs(name)
  structure = golden_hf.structure(name)
  definition = golden_hf.family(name).model(config=golden_hf.config(name))
  generator = decode.EncDecGenerator(structure, definition, start_id=0,
                                     sampling=decode.Sampling(temperature=0))
  rows = [ids[mask > 0].tolist()
          for ids, mask in zip(io['gen_input_ids'], io['gen_attention_mask'], strict=True)]
  assert len(set(map(len, rows))) > 1
  new = io['gen_new_ids'].shape[1]
  assert generator(golden_hf.params(name, structure), rows,
                   new_tokens=new) == io['gen_new_ids'].tolist()


@pytest.mark.parametrize('name', MASKED + WRITING)
def test_settings_in_both_spellings_and_back(name):
  family, read = golden_hf.family(name), golden_hf.settings(name)
  config = family.read(read)
  assert not read.unread()
  assert family.read(golden_hf.settings(name, 'config_v4.json')) == config
  written = family.write(config)
  assert family.read(Settings(written)) == config
  assert family.read(Settings(family.older(written))) == config
  assert family in family_lib.of_config(golden_hf.changed(config, layer_loop='unroll'))


@pytest.mark.parametrize('name', MASKED + WRITING)
def test_export_returns_the_same_bytes(name):
  structure, family = golden_hf.structure(name), golden_hf.family(name)
  stored = golden_hf.stored(name)
  flat = tree.from_tensors(family, golden_hf.config(name), golden_hf.leaves(structure), stored)
  made = dict(tree.to_tensors(family, golden_hf.config(name), golden_hf.leaves(structure),
                              lambda path, index: flat[path][index]))
  assert made.keys() == stored.keys()
  for key, value in made.items():
    assert value.shape == stored[key].shape and value.tobytes() == stored[key].read().tobytes()


def _save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, files.Stored]:
  """Writes float32 tensors in safetensors format and reads them back."""
  header, at = {}, 0
  for name, value in tensors.items():
    header[name] = {'dtype': 'F32', 'shape': list(value.shape),
                    'data_offsets': [at, at := at + value.nbytes]}
  head = json.dumps(header).encode()
  path.write_bytes(len(head).to_bytes(8, 'little') + head
                   + b''.join(value.tobytes() for value in tensors.values()))
  return files.header(str(path))


@pytest.mark.parametrize('name, root, bias', [
    ('bert_mlm', 'bert', 'cls.predictions'), ('roberta_mlm', 'roberta', 'lm_head')])
def test_published_files_are_read(name, root, bias, tmp_path):
  """Old names of norms, buffers, heads of other tasks, and tied tensors stored a second time."""
  tensors = {key: value.read().astype(np.float32)
             for key, value in golden_hf.stored(name).items()}
  old = {key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'): value for key, value in tensors.items()}
  assert old.keys() != tensors.keys()
  extra = {f'{root}.embeddings.position_ids': np.zeros((1, 4), np.float32),
           f'{root}.pooler.dense.weight': np.zeros((4, 4), np.float32),
           f'{bias}.decoder.weight': tensors[f'{root}.embeddings.word_embeddings.weight'],
           f'{bias}.decoder.bias': tensors[f'{bias}.bias']}
  family, config = golden_hf.family(name), golden_hf.config(name)
  leaves = golden_hf.leaves(golden_hf.structure(name))
  plain = tree.from_tensors(family, config, leaves, golden_hf.stored(name))
  found = tree.from_tensors(family, config, leaves, _save(tmp_path / 'a', {**old, **extra}))
  jax.tree.map(np.testing.assert_array_equal, found, plain)
  extra[f'{bias}.decoder.bias'] = extra[f'{bias}.decoder.bias'] + 1
  with pytest.raises(ValueError, match=f'unexpected: {bias}.decoder.bias'):
    tree.from_tensors(family, config, leaves, _save(tmp_path / 'b', {**old, **extra}))


def test_packed_documents_score_as_separate_ones():
  name = 'roberta_mlm'
  structure = golden_hf.structure(name, layer_loop='unroll')
  params = golden_hf.params(name, structure)
  io = golden_hf.outputs(name)
  first, second = io['input_ids'][0, :11], io['input_ids'][1, :7]
  types = np.zeros((1, 18), np.int32)
  run = jax.jit(lambda params, *a: structure.module(params)(
      a[0], positions=a[1], segment_ids=a[2], types=a[3]))
  positions = np.concatenate([np.arange(11), np.arange(7)]).astype(np.int32)[None]
  segments = np.array([[1] * 11 + [2] * 7], np.int32)
  packed = run(params, np.concatenate([first, second])[None], positions, segments, types)
  for ids, at in ((first, slice(0, 11)), (second, slice(11, 18))):
    count = len(ids)
    alone = run(params, ids[None], np.arange(count, dtype=np.int32)[None],
                np.ones((1, count), np.int32), types[:, :count])
    np.testing.assert_allclose(packed[:, at], alone, atol=2e-5)


def test_a_token_sees_both_sides_and_no_other_document():
  """Shown by gradients: those of one place's logits reach all places of its segment, no others."""
  stack = golden_hf.config('bert_mlm').stack
  definition = encoder.EncoderLM(config=encoder.EncoderConfig(stack=stack, types=2))
  structure = golden_hf.structure('bert_mlm', layer_loop='unroll')
  assert definition.vocab == stack.vocab
  params = golden_hf.params('bert_mlm', structure)
  segments = jnp.array([[1, 1, 1, 2, 2, 0]], jnp.int32)
  inputs = jnp.arange(5, 11, dtype=jnp.int32)[None]

  def score(table):
    changed = {**params, 'position': {'embedding': table}}
    return jnp.sum(structure.module(changed)(inputs, segment_ids=segments)[0, 1])

  reached = np.abs(jax.jit(jax.grad(score))(params['position']['embedding'])[:6]).max(-1) > 0
  assert reached.tolist() == [True, True, True, False, False, False]


def test_rows_and_types_an_encoder_has_no_table_for_are_refused():
  config = golden_hf.config('roberta_mlm')
  structure = golden_hf.structure('roberta_mlm')
  call = lambda length: jax.eval_shape(lambda params: structure.module(params)(
      jnp.zeros((1, length), jnp.int32)), structure.shapes)
  assert call(34).shape == (1, 34, 100)
  with pytest.raises(ValueError, match='35 tokens exceeds the 34 .*first_position=2'):
    call(35)
  bare = state.describe(encoder.EncoderLM(config=dataclasses.replace(config, types=0)),
                        structure.mesh, structure.rules)
  ids = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ValueError, match='EncoderConfig.types=0'):
    jax.eval_shape(lambda p: bare.module(p)(ids, types=ids), bare.shapes)
  with pytest.raises(ValueError, match="first_position=2 needs position='learned'"):
    encoder.EncoderConfig(stack=dataclasses.replace(config.stack, position='rope'),
                          first_position=2)
