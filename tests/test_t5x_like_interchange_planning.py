"""Dry runs of imports and exports: what they show, that they write nothing, all errors at once."""

import json
import os
import pathlib
import shutil

import golden_hf
import numpy as np
import pytest

from models.hf import files
from t5x_like import config
from t5x_like.interchange import arguments, importing, planning, safetensors


@pytest.fixture(autouse=True)
def forget():
  yield
  config.clear()


@pytest.fixture
def theirs(tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(golden_hf.FOLDER / 'llama2_gqa', tmp_path / 'llama'))


def _run(*argv: str) -> int:
  command, rest = arguments.split(argv)
  target, flags = {'import': ('import_model', arguments.IMPORT),
                   'export': ('export_model', arguments.EXPORT),
                   'verify': ('verify', arguments.VERIFY)}[command]
  return config.run(f't5x_like.convert.{target}', rest, flags=flags)


def _everything(folder: pathlib.Path) -> dict[str, int]:
  return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob('*'))}


def test_commands_of_the_documentation(theirs, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  text = (pathlib.Path(__file__).parent.parent / 'docs/interchange.md').read_text()
  first, second = text.split('```bash\n')[2].split('```')[0].splitlines()
  before = _everything(tmp_path)
  assert _run(*first.split()[3:]) == 0
  assert _everything(tmp_path) == before
  printed = capsys.readouterr().out
  assert 'model.layers.0..1.mlp.up_proj.weight' in printed and 'files: none' in printed
  importing.import_folder('llama', out='runs/llama')
  before = _everything(tmp_path)
  assert _run(*second.split()[3:]) == 0
  assert _everything(tmp_path) == before
  assert 'float32 > F32' in capsys.readouterr().out


def test_layout_and_bytes_are_those_on_the_mesh(theirs, tmp_path, capsys):
  shutil.copy(golden_hf.FOLDER / 'tokenizers/sp_bpe_llama/tokenizer.model', theirs)
  assert _run('import', str(theirs), f'--out={tmp_path}/out', '--dry_run', '--dtype=bfloat16',
              '--gin_file=runs/convert.gin', '--gin_file=mesh/fsdp_tensor.gin',
              '--gin.mesh.make_mesh.devices=4') == 0
  printed = capsys.readouterr().out
  line = next(line for line in printed.splitlines() if 'layers/mlp/up/kernel' in line)
  assert line.split() == ['model.layers.0..1.mlp.up_proj.weight', 'layers/mlp/up/kernel', '2x32x72',
                          'F32', '>', 'bfloat16', 'layers', 'embed=fsdp', 'mlp=tensor',
                          f'{2 * 16 * 36 * 2:,}']
  assert "'fsdp': 2" in printed and 'tokenizer and other files: tokenizer.model' in printed


def test_a_model_of_two_stacks_and_files_it_is_exported_to(tmp_path, capsys):
  shown = planning.show_import(str(golden_hf.FOLDER / 't5_v1_1'), out=str(tmp_path / 'out'))
  by_path = {one.path: one for one in shown}
  assert by_path['decoder/layers/cross/query/kernel'].theirs == (
      'decoder.block.0..1.layer.1.EncDecAttention.q.weight')
  assert sum(one.bytes for one in shown) == 4 * sum(
      np.prod(s.shape, dtype=int) for s in golden_hf.stored('t5_v1_1').values())
  ours = importing.import_folder(str(golden_hf.FOLDER / 't5_v1_1'), out=str(tmp_path / 'ours'))
  capsys.readouterr()
  planning.show_export(ours, out=str(tmp_path / 'again'), shard_size='20KB', dtype='bf16')
  printed = capsys.readouterr().out
  assert 'float32 > BF16' in printed and '80,800 bytes' in printed and 'in 5 files' in printed
  assert sorted(os.listdir(tmp_path)) == ['ours']


def test_everything_that_is_wrong_is_listed_at_once(theirs, tmp_path, capsys):
  tensors = {name: stored.read() for name, stored in files.tensors(str(theirs)).items()}
  del tensors['model.norm.weight']
  tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((32, 72), np.float32)
  tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((72, 32), np.int8)
  tensors['model.more.weight'] = np.zeros((3,), np.float32)
  names = {value: key for key, value in files.DTYPES.items()}
  safetensors.write(str(theirs), [safetensors.Planned(name, names[x.dtype], x.shape)
                                  for name, x in tensors.items()], tensors.values(),
                    shard_size=10**9)
  values = json.loads((theirs / 'config.json').read_text())
  (theirs / 'config.json').write_text(json.dumps({**values, 'residual_multiplier': 0.2}))
  (tmp_path / 'out').mkdir()
  assert _run('import', str(theirs), f'--out={tmp_path}/out', '--dry_run') == 2
  printed = capsys.readouterr()
  for text in ('out exists already', 'llama does not know residual_multiplier=0.2',
               'missing: model.norm.weight [32]', 'unexpected: model.more.weight [3]',
               'shape: model.layers.0.mlp.up_proj.weight is [32, 72]',
               'dtype: model.layers.1.mlp.up_proj.weight is I8'):
    assert text in printed.err, text
  assert 'layers/mlp/up/kernel' in printed.out and 'Traceback' not in printed.err
  (theirs / 'config.json').unlink()
  with pytest.raises(ValueError, match=r"dtype='f8'(.|\n)*no config.json in it"):
    planning.show_import(str(theirs), out=str(tmp_path / 'new'), dtype='f8')  # pyright: ignore


def test_an_export_that_cannot_be_is_refused_before_it_begins(theirs, tmp_path, capsys):
  ours = importing.import_folder(str(theirs), out=str(tmp_path / 'ours'))
  with pytest.raises(ValueError, match=r"shard_size='many' is no size(.|\n)*llama exists already"
                                       r"(.|\n)*family='bert' cannot express"):
    planning.show_export(ours, out=str(theirs), shard_size='many', family='bert')
  with pytest.raises(ValueError, match=r"dtype='f8'(.|\n)*which='best'"):
    planning.show_export(ours, out=str(tmp_path / 'new'), dtype='f8',  # pyright: ignore
                         which='best')  # pyright: ignore
  assert _run('verify', 'theirs', 'ours', '--dry_run') == 2
  assert 'verify writes nothing' in capsys.readouterr().err
