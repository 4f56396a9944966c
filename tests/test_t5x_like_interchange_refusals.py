"""Folders that are not what they say: each is refused by name and leaves nothing behind."""

import json
import os
import pathlib
import re
import shutil

import golden_hf
import numpy as np
import pytest
import toy

from models.hf import files
from t5x_like import checkpoints, config
from t5x_like.interchange import arguments, exporting, importing, safetensors

_NAME = 'llama2_gqa'


@pytest.fixture
def theirs(tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(golden_hf.FOLDER / _NAME, tmp_path / 'theirs'))


def _refused(theirs: pathlib.Path, message: str, **more) -> str:
  with pytest.raises(ValueError, match=message) as error:
    importing.import_folder(str(theirs), out=str(theirs.parent / 'out'), **more)
  assert os.listdir(theirs.parent) == [theirs.name]
  return str(error.value)


def _rewrite(theirs: pathlib.Path, change) -> None:
  """Writes the tensors again after `change` has been at them."""
  tensors = {name: stored.read() for name, stored in files.tensors(str(theirs)).items()}
  change(tensors)
  names = {value: key for key, value in files.DTYPES.items()}
  planned = [safetensors.Planned(name, names[x.dtype], x.shape) for name, x in tensors.items()]
  safetensors.write(str(theirs), planned, tensors.values(), shard_size=10**9)


def _settings(theirs: pathlib.Path, **change) -> None:
  values = json.loads((theirs / 'config.json').read_text())
  (theirs / 'config.json').write_text(json.dumps({**values, **change}))


def test_every_tensor_that_does_not_fit_is_listed_at_once(theirs):
  def change(tensors):
    del tensors['model.norm.weight']
    tensors['model.norm.wieght'] = np.zeros((32,), np.float32)
    tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((32, 72), np.float32)
    tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((72, 32), np.int8)
  _rewrite(theirs, change)
  text = _refused(theirs, '4 tensors do not fit a llama')
  for line in ('missing: model.norm.weight [32]; did you mean model.norm.wieght?',
               'unexpected: model.norm.wieght [32]; did you mean model.norm.weight?',
               'shape: model.layers.0.mlp.up_proj.weight is [32, 72], but config.json makes it '
               '[72, 32]', 'dtype: model.layers.1.mlp.up_proj.weight is I8'):
    assert line in text


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(theirs, value):
  def change(tensors):
    broken = tensors['model.layers.1.mlp.down_proj.weight'].copy()
    broken[3, 4] = value
    tensors['model.layers.1.mlp.down_proj.weight'] = broken
  _rewrite(theirs, change)
  _refused(theirs, r'model.safetensors: model.layers.1.mlp.down_proj.weight holds 1 values that '
                   'are NaN or infinite')


def test_all_tensors_that_are_not_finite_are_listed(theirs):
  names = [f'model.layers.{i}.input_layernorm.weight' for i in range(2)]
  _rewrite(theirs, lambda tensors: tensors.update(
      {name: np.full((32,), np.nan, np.float32) for name in names}))
  text = _refused(theirs, 'holds 32 values')
  assert all(f'{name} holds 32 values that are NaN' in text for name in names)


def test_a_value_too_large_for_the_dtype_asked_for_is_named(theirs):
  def change(tensors):
    tensors['model.norm.weight'] = np.full((32,), 1e6, np.float32)
  _rewrite(theirs, change)
  _refused(theirs, 'model.norm.weight holds 32 values .* infinite as float16', dtype='float16')


def test_a_file_that_was_cut_is_named(theirs):
  path = theirs / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-10])
  _refused(theirs, 'model.safetensors: has .* it has been cut: download it again')
  path.write_bytes(path.read_bytes()[:100])
  _refused(theirs, 'model.safetensors: no safetensors file, or cut inside its header')


def _entries(theirs: pathlib.Path) -> tuple[dict, bytes]:
  content = (theirs / files.SINGLE).read_bytes()
  length = 8 + int.from_bytes(content[:8], 'little')
  return json.loads(content[8:length]), content[length:]


def _put(theirs: pathlib.Path, text: str, data: bytes) -> None:
  (theirs / files.SINGLE).write_bytes(len(text).to_bytes(8, 'little') + text.encode() + data)


_UP = 'model.layers.0.mlp.up_proj.weight'


@pytest.mark.parametrize('change, message', [
    ({'data_offsets': [-9216, 0]}, 'needs dtype, shape and data_offsets of numbers from 0'),
    ({'data_offsets': [0, 9216]}, 'begins at byte .* ends at .*; tensors lie one after the other'),
    ({'shape': [72.0, 32]}, 'needs dtype, shape and data_offsets of numbers from 0'),
    ({'shape': [2**40, 2**40]}, 'needs 48357.* bytes, but has 9216'),
    ({'shape': None}, 'needs dtype, shape and data_offsets of numbers from 0'),
])
def test_an_entry_that_contradicts_itself_is_named(theirs, change, message):
  entries, data = _entries(theirs)
  entries[_UP].update(change)
  _put(theirs, json.dumps(entries), data)
  _refused(theirs, f'model.safetensors: .*{message}')


def test_a_header_is_one_object_that_tells_every_byte_once(theirs):
  entries, data = _entries(theirs)
  text = json.dumps(entries)
  _put(theirs, text, data + b'more')
  _refused(theirs, 'has 4 bytes after model.norm.weight, which belong to no tensor')
  _put(theirs, f'{text[:-1]}, "{_UP}": {json.dumps(entries[_UP])}}}', data)
  _refused(theirs, f'{_UP} is twice in its header')
  for broken in ('[1]', 'null', '[' * 100_000):
    _put(theirs, broken, data)
    _refused(theirs, 'its header is n.*; not a safetensors file')


def _add(theirs: pathlib.Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
  entries, old = _entries(theirs)
  entries[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [len(old), len(old + data)]}
  _put(theirs, json.dumps(entries), old + data)


def test_buffers_of_older_files_are_passed_over_whatever_their_dtype(theirs):
  _add(theirs, 'model.layers.0.self_attn.rotary_emb.inv_freq', 'F8_E4M3', [4], b'abcd')
  _add(theirs, 'model.position_ids', 'I64', [1], bytes(8))
  _add(theirs, 'model.layers.0.self_attn.maybe_rotary.inv_freq', 'F32', [1], bytes(4))
  importing.import_folder(str(theirs), out=str(theirs.parent / 'out'))


def test_a_tensor_of_an_unknown_dtype_is_listed_with_the_others(theirs):
  entries, data = _entries(theirs)
  entries[_UP]['dtype'] = 'F8_E5M2'
  _put(theirs, json.dumps(entries), data)
  _add(theirs, 'model.layers.0.mlp.up_proj.weight_scale', 'F8_E4M3', [4], b'abcd')
  text = _refused(theirs, '2 tensors do not fit')
  assert f'dtype: {_UP} is F8_E5M2' in text and 'up_proj.weight_scale [4]' in text


@pytest.mark.parametrize('name', ['llama2_gqa', 'gpt_neox', 'falcon_7b'])
def test_a_model_saved_without_the_prefix_of_its_body_is_read(tmp_path, name):
  theirs = pathlib.Path(shutil.copytree(golden_hf.FOLDER / name, tmp_path / 'theirs'))
  entries, data = _entries(theirs)
  _put(theirs, json.dumps({re.sub(r'^(model|gpt_neox|transformer)\.', '', name): entry
                           for name, entry in entries.items()}), data)
  out = importing.import_folder(str(theirs), out=str(tmp_path / 'out'))
  structure = golden_hf.structure(name)
  assert toy.tree_equal(checkpoints.load_params(out, structure.shapes),
                        golden_hf.params(name, structure))


def test_a_head_that_differs_from_the_table_it_is_tied_to_is_told(theirs):
  _settings(theirs, tie_word_embeddings=True)
  _refused(theirs, 'unexpected: lm_head.weight .*; config.json ties it to '
                   'model.embed_tokens.weight, but they differ: set tie_word_embeddings to false')
  def change(tensors):
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  _rewrite(theirs, change)
  importing.import_folder(str(theirs), out=str(theirs.parent / 'out'))


@pytest.mark.parametrize('content', ['{', '[]', '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(theirs, content):
  (theirs / files.SINGLE).rename(theirs / 'model-00001-of-00001.safetensors')
  _refused(theirs, 'model-00001-of-00001.safetensors is one of several files, whose index is '
                   'missing')
  (theirs / files.INDEX).write_text(content)
  _refused(theirs, 'index.json is no JSON object whose weight_map names a file for each tensor')
  (theirs / files.INDEX).write_text('{"weight_map": {"a": "../x"}}')
  _refused(theirs, r'names files outside of its folder: \.\./x')


def test_a_tensor_in_two_files_and_two_models_in_one_folder_are_refused(theirs):
  both = ('a.safetensors', 'b.safetensors')
  (theirs / files.INDEX).write_text(json.dumps({'weight_map': {_UP: both[0], 'other': both[1]}}))
  _refused(theirs, 'model.safetensors and model.safetensors.index.json are both there')
  for name in both:
    shutil.copy(theirs / files.SINGLE, theirs / name)
  (theirs / files.SINGLE).unlink()
  _refused(theirs, f'{_UP} is in a.safetensors and in b.safetensors')


def test_adapters_and_quantised_weights_are_refused_by_name(theirs):
  _settings(theirs, quantization_config={'quant_method': 'gptq', 'bits': 4})
  _refused(theirs, "weights are quantised .*method 'gptq'.*import the model they were made from")
  _settings(theirs, quantization_config=None)
  (theirs / files.SINGLE).rename(theirs / 'adapter_model.safetensors')
  _refused(theirs, r'adapter_model.safetensors is an adapter \(LoRA\) without its model: merge')


def test_an_index_that_names_an_absent_file_is_refused(tmp_path):
  theirs = pathlib.Path(shutil.copytree(golden_hf.FOLDER / 'llama_sharded_bf16',
                                        tmp_path / 'theirs'))
  (theirs / 'model-00002-of-00002.safetensors').unlink()
  _refused(theirs, 'model-00002-of-00002.safetensors, which model.safetensors.index.json names, '
                   'is missing')


def test_pickles_are_refused_with_the_way_out(theirs):
  (theirs / 'model.safetensors').rename(theirs / 'pytorch_model.bin')
  _refused(theirs, r'pytorch_model.bin is a pickle.*save_pretrained\(.*safe_serialization=True')


def test_settings_are_refused_by_name(theirs, capsys):
  _settings(theirs, model_type='lama')
  _refused(theirs, "model_type 'lama' is unknown; did you mean 'llama'")
  _settings(theirs, model_type='llama', residual_multiplier=0.22)
  _refused(theirs, "llama does not know residual_multiplier=0.22; they may change .*"
                   "--unknown=ignore")
  (theirs / 'config.json').write_text('{"model_type": ')
  _refused(theirs, 'config.json is not JSON')
  (theirs / 'config.json').unlink()
  (theirs / 'config.json').mkdir()
  _refused(theirs, 'config.json cannot be read: Is a directory')
  (theirs / 'config.json').rmdir()
  _refused(theirs, 'no config.json in it')
  shutil.rmtree(theirs)
  with pytest.raises(ValueError, match='no such folder'):
    importing.import_folder(str(theirs), out=str(theirs.parent / 'out'))


@pytest.mark.parametrize('change', [
    {'num_attention_heads': 0, 'head_dim': None}, {'rope_parameters': [1]}, {'hidden_size': '32'},
    {'rope_parameters': {'rope_type': 'llama3', 'factor': 2.0}}, {'model_type': ['llama']},
    {'rope_parameters': {'rope_type': 'default', 'rope_theta': 'x'}}])
def test_settings_of_the_wrong_kind_are_refused_with_their_file(theirs, change):
  _settings(theirs, **change)
  _refused(theirs, 'theirs/config.json: ')


def test_a_byte_order_mark_is_no_error(theirs):
  path = theirs / 'config.json'
  path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
  importing.import_folder(str(theirs), out=str(theirs.parent / 'out'))


def test_unknown_settings_are_listed_when_they_are_ignored(theirs, capsys):
  _settings(theirs, residual_multiplier=0.22)
  importing.import_folder(str(theirs), out=str(theirs.parent / 'out'), unknown='ignore')
  assert 'ignored residual_multiplier=0.22' in capsys.readouterr().err


def test_an_existing_target_is_never_touched(theirs, tmp_path):
  (tmp_path / 'out').mkdir()
  with pytest.raises(ValueError, match='out exists already'):
    importing.import_folder(str(theirs), out=str(tmp_path / 'out'))
  assert os.listdir(tmp_path / 'out') == []


def test_a_folder_of_anyone_elses_is_never_removed(theirs, tmp_path):
  ours = importing.import_folder(str(theirs), out=str(tmp_path / 'ours'))
  mine = tmp_path / 'out.partial' / 'mine'
  mine.parent.mkdir()
  mine.write_text('mine')
  for convert in (lambda out: importing.import_folder(str(theirs), out=out),
                  lambda out: exporting.export(ours, out=out)):
    with pytest.raises(ValueError, match='out.partial .* no conversion left it: move it away'):
      convert(str(tmp_path / 'out'))
  assert mine.read_text() == 'mine'


@pytest.mark.parametrize('argv, message', [
    ([], 'a command is needed: import'), (['improt', 'x'], "'improt' is no command; did you mean"),
    (['import', '--out=x'], 'import needs HF_DIR after it'),
    (['import', 'x'], 'import needs --out=DIR'),
])
def test_the_command_line_says_what_is_missing(argv, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    arguments.split(argv)
  assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_errors_reach_the_command_line_in_one_message(theirs, capsys):
  (theirs / 'config.json').unlink()
  _, rest = arguments.split(['import', str(theirs), '--out', str(theirs.parent / 'out')])
  assert config.run('t5x_like.convert.import_model', rest, flags=arguments.IMPORT) == 2
  printed = capsys.readouterr().err
  assert printed.startswith('error: ') and 'Traceback' not in printed
  config.clear()
