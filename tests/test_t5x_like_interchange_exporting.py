"""Exporting a checkpoint in Hugging Face format: the same bytes, readable settings, or nothing."""

import dataclasses
import json
import os
import pathlib
import shutil

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import family as family_lib
from models.hf import files, tree
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import checkpoints, config, state
from t5x_like.interchange import arguments, exporting, folder, importing, safetensors

_KNOWN = {kind for family in family_lib.families().values() for kind in family.model_types}
_QUICK = {'llama2_gqa', 'llama_sharded_bf16', 'falcon_40b', 'mixtral', 't5_v1_0', 'bert_mlm'}
NAMES = [
    name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(path.parent.name for path in golden_hf.FOLDER.glob('*/io.npz'))
    if json.loads((golden_hf.FOLDER / name / 'config.json').read_text())['model_type'] in _KNOWN]


@pytest.fixture(autouse=True)
def forget():
  yield
  config.clear()


@pytest.mark.parametrize('name', NAMES)
def test_import_and_export_return_every_byte(name, tmp_path, monkeypatch):
  theirs = golden_hf.FOLDER / name
  out = importing.import_folder(str(theirs), out=str(tmp_path / 'ours'))
  stored, family = golden_hf.stored(name), golden_hf.family(name)
  found = folder.load(str(theirs))
  structure = state.describe(family.model(config=found.config), mesh_lib.make_mesh(devices=1),
                             rules_lib.data_parallel())
  flat = tree.from_tensors(family, found.config, folder.leaves(structure), stored)
  params = state.path_dict(checkpoints.load_params(out, structure.shapes))
  for path, value in flat.items():
    np.testing.assert_array_equal(np.asarray(params[path]), value, err_msg=path)
  again, models, export = str(tmp_path / 'theirs'), [], exporting.export
  monkeypatch.setattr(exporting, 'export', lambda *a, model, **k: (
      models.append(model), export(*a, model=model, **k))[1])
  assert _export(out, f'--out={again}', f'--gin_file={out}/model.gin', '--module=t5x_like.convert',
                 '--gin.t5x_like.convert.export_model.model=%MODEL') == 0
  assert models == [family.model(config=found.config)]
  made = files.tensors(again)
  wanted = {key: tensor for theirs_key, tensor in stored.items()
            if (key := family.canonical(theirs_key))}
  constants = family.constants(found.config)
  assert made.keys() - constants.keys() == wanted.keys()
  for key, tensor in wanted.items():
    assert (made[key].dtype, made[key].shape) == (tensor.dtype, tensor.shape)
    assert made[key].read().tobytes() == tensor.read().tobytes(), key
  reread = folder.load(again)
  assert reread.config == found.config and reread.family is family
  for key in ('architectures', 'dtype', 'bos_token_id', 'eos_token_id'):
    assert reread.values.get(key) == found.values.get(key), key


def _export(*argv: str) -> int:
  command, rest = arguments.split(['export', *argv])
  assert command == 'export'
  return config.run('t5x_like.convert.export_model', rest, flags=arguments.EXPORT)


def test_shards_dtype_and_spelling_as_asked(tmp_path):
  theirs = str(golden_hf.FOLDER / 'llama2_gqa')
  ours = importing.import_folder(theirs, out=str(tmp_path / 'ours'))
  out = tmp_path / 'theirs'
  assert _export(ours, f'--out={out}', '--dtype=bf16', '--shard_size=20KB',
                 '--spelling=older') == 0
  index = json.loads((out / files.INDEX).read_text())
  names = sorted(set(index['weight_map'].values()))
  assert len(names) > 2 and names[0] == f'model-00001-of-{len(names):05d}.safetensors'
  assert all((out / name).stat().st_size < 22_000 for name in names)
  made = files.tensors(str(out))
  assert index['metadata']['total_size'] == sum(tensor.size for tensor in made.values())
  for key, tensor in golden_hf.stored('llama2_gqa').items():
    assert made[key].dtype == 'BF16'
    np.testing.assert_array_equal(made[key].read(), tensor.read().astype(jnp.bfloat16))
  values = json.loads((out / 'config.json').read_text())
  assert values['torch_dtype'] == 'bfloat16' and values['rope_theta'] == 10000.0
  assert not {'dtype', 'rope_parameters'} & values.keys()


def _own(tmp_path) -> tuple[DecoderLM, dict]:
  """A run of ours with an average of its weights, as training saves it."""
  model = DecoderLM(config=DecoderConfig(vocab=32, embed=16, layers=2, heads=2, mlp=24,
                                         dtype='float32'))
  structure = state.describe(model, mesh_lib.make_mesh(devices=1), rules_lib.data_parallel())
  draw = np.random.default_rng(0)
  trees = {root: jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype),
                              structure.shapes) for root in ('params', 'ema')}
  with checkpoints.Checkpointer(tmp_path / 'run', every=1, mode='sync') as keeper:
    keeper.save(3, {**trees, 'step': jnp.int32(3)}, extra={})
  return model, trees


def test_a_run_of_ours_is_exported_and_its_average_preferred(tmp_path, capsys):
  model, trees = _own(tmp_path)
  cases: list[tuple[exporting.Which, str]] = [('evaluated', 'ema'), ('params', 'params')]
  for which, root in cases:
    out = exporting.export(str(tmp_path / 'run'), out=str(tmp_path / which), model=model,
                           which=which, family='llama')
    made = files.tensors(out)
    up = made['model.layers.1.mlp.up_proj.weight'].read()
    np.testing.assert_array_equal(up, np.asarray(trees[root]['layers']['mlp']['up']['kernel'])[1].T)
  capsys.readouterr()
  exporting.export(str(tmp_path / 'run/3'), out=str(tmp_path / 'any'), model=model)
  able = list(exporting.able(model.config))
  assert len(able) > 1 and f'note: written as {able[0]};' in capsys.readouterr().err


def test_the_gin_of_a_run_says_what_model_its_checkpoint_holds(tmp_path):
  model, trees = _own(tmp_path)
  sizes = {name: getattr(model.config, name) for name in ('embed', 'layers', 'heads', 'mlp')}
  assert _export(
      str(tmp_path / 'run'), f'--out={tmp_path / "out"}', '--family=llama',
      '--gin_file=runs/pretrain.gin', '--gin_file=models/decoder.gin', '--gin.VOCAB_SIZE=32',
      *(f'--gin.config.DecoderConfig.{name}={value}' for name, value in sizes.items())) == 0
  norm = files.tensors(str(tmp_path / 'out'))['model.norm.weight'].read()
  np.testing.assert_array_equal(norm, np.asarray(trees['ema']['norm']['scale']))


@pytest.mark.parametrize('change, message', [
    ({'model': None}, 'give the configuration of the run.*--gin_file=RUN/config.gin'),
    ({'family': 'gpt2'}, "family='gpt2' cannot express this model; those that can: .*llama"),
    ({'family': 'lama'}, "family='lama' is no family"),
    ({'step': 4}, r'no complete checkpoint of step 4 .*there are \[3\]'),
    ({'shard_size': '5 apples'}, "shard_size='5 apples' is no size"),
    ({'dtype': 'int8'}, "dtype='int8'; allowed: as_imported, f32, bf16, f16"),
    ({'model': 'wider'}, r'embed/embedding is \[32, 16\], the model makes it \[32, 32\]'),
])
def test_what_cannot_be_exported_is_refused(tmp_path, change, message):
  model, _ = _own(tmp_path)
  if change.get('model') == 'wider':
    change = {'model': DecoderLM(config=dataclasses.replace(model.config, embed=32))}
  with pytest.raises(ValueError, match=message):
    exporting.export(str(tmp_path / 'run'), **{'out': str(tmp_path / 'out'), 'model': model,
                                               **change})
  assert os.listdir(tmp_path) == ['run']


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
  ours = importing.import_folder(str(golden_hf.FOLDER / 'llama2_gqa'), out=str(tmp_path / 'ours'))
  chunk = pathlib.Path(ours, '0/state/params.layers.mlp.up.kernel/1.0.0')
  data = bytearray(chunk.read_bytes())
  data[5] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(ValueError, match='is damaged: params/layers/mlp/up/kernel differ'):
    exporting.export(ours, out=str(tmp_path / 'out'))
  assert os.listdir(tmp_path) == ['ours']


def test_values_too_large_for_float16_are_refused_all_at_once(tmp_path):
  model, trees = _own(tmp_path)
  large = jax.tree.map(lambda x: x, trees['params'])
  for name in ('norm', 'head'):
    large[name] = jax.tree.map(lambda x: x.at[0].set(1e6), large[name])
  with checkpoints.Checkpointer(tmp_path / 'run', every=1, mode='sync') as keeper:
    keeper.save(4, {'params': large}, extra={})
  with pytest.raises(ValueError, match='--dtype=bf16 or f32 has the range') as error:
    exporting.export(str(tmp_path / 'run'), out=str(tmp_path / 'out'), model=model, dtype='f16',
                     family='llama')
  assert 'model.norm.weight: 1 values that are NaN or infinite as F16' in str(error.value)
  assert 'lm_head.weight: 32 values' in str(error.value)
  assert os.listdir(tmp_path) == ['run']
  exporting.export(str(tmp_path / 'run'), out=str(tmp_path / 'out'), model=model, dtype='bf16',
                   family='llama')


def test_sizes_are_read():
  assert [safetensors.size(t) for t in ('7', '20KB', '1.5GB', ' 3mb ')] == [
      7, 20_000, 1_500_000_000, 3_000_000]


def test_a_tensor_that_nothing_is_computed_with_comes_back_too(tmp_path):
  """An untied BERT has two biases of its head, of which one is added."""
  theirs = pathlib.Path(shutil.copytree(golden_hf.FOLDER / 'bert_mlm', tmp_path / 'theirs'))
  tensors = {name: one.read() for name, one in files.tensors(str(theirs)).items()}
  tensors['cls.predictions.decoder.weight'] = np.flip(
      tensors['bert.embeddings.word_embeddings.weight'], 0).copy()
  tensors['cls.predictions.decoder.bias'] = tensors['cls.predictions.bias'] + 1
  safetensors.write(str(theirs), [safetensors.Planned(name, 'F32', x.shape)
                                  for name, x in tensors.items()], tensors.values(),
                    shard_size=10**9)
  values = json.loads((theirs / 'config.json').read_text())
  (theirs / 'config.json').write_text(json.dumps({**values, 'tie_word_embeddings': False}))
  ours = importing.import_folder(str(theirs), out=str(tmp_path / 'ours'))
  again = exporting.export(ours, out=str(tmp_path / 'again'))
  found = {name: one.read() for name, one in files.tensors(again).items()}
  assert found.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
