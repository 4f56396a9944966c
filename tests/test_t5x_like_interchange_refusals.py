"""Folders that are not what they say: each is refused by name and leaves nothing behind."""

import json
import os
import pathlib
import shutil

import golden_hf
import numpy as np
import pytest

from models.hf import files
from t5x_like import config
from t5x_like.interchange import arguments, importing, safetensors

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
  _refused(theirs, 'no config.json in it')
  shutil.rmtree(theirs)
  with pytest.raises(ValueError, match='no such folder'):
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
