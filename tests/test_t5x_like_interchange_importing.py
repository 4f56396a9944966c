"""Importing a folder in Hugging Face format: what arrives, what a kill leaves, what is refused."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from t5x_like import checkpoints, config, integrity
from t5x_like.interchange import arguments, arrays, importing

_LLAMA = golden_hf.FOLDER / 'llama2_gqa'


@pytest.fixture(autouse=True)
def forget():
  yield
  config.clear()


def _import(*argv: str) -> int:
  command, rest = arguments.split(['import', *argv])
  assert command == 'import'
  return config.run('t5x_like.convert.import_model', rest, flags=arguments.IMPORT)


def _copy(tmp_path, name: str = 'llama2_gqa') -> pathlib.Path:
  return pathlib.Path(shutil.copytree(golden_hf.FOLDER / name, tmp_path / 'theirs'))


def test_sums_of_pieces_are_the_checksum_of_the_whole():
  whole = np.random.default_rng(0).normal(size=(3, 70_001)).astype(np.float32)
  for dtype in (np.float32, np.float16, jnp.bfloat16):
    x = whole.astype(dtype)
    pieces = integrity.Pieces()
    for row in (2, 0, 1):
      pieces.add(x[row], row * x.shape[1])
    assert integrity.sums_text(pieces.sums) == integrity.checksums({'x': jnp.asarray(x)})['x']
    assert pieces.not_finite == 0


@pytest.mark.parametrize('name, begin', [('llama2_gqa', True), ('gpt_neox', False),
                                         ('t5_v1_1', False)])
def test_generate_continues_an_import_as_the_reference_does(tmp_path, capsys, name, begin):
  out = tmp_path / 'ours'
  assert _import(str(golden_hf.FOLDER / name), '--out', str(out)) == 0
  io = golden_hf.outputs(name)
  reads = 'gen_input_ids' in io
  ids = io['gen_input_ids' if reads else 'gen_prompt_ids'][0].tolist()
  new, shown = io['gen_new_ids'][0].tolist(), ids[1:] if begin else ids
  # Ids as text, so that the numbers of the reference can be given and read.
  capsys.readouterr()
  status = config.run('t5x_like.generate.generate', [
      '--gin_file=runs/generate.gin', f'--gin_file={out}/model.gin', f'--gin.MODEL_DIR="{out}"',
      *([f'--gin.BOS_ID={ids[0]}'] if begin else []), '--module=t5x_like.decode',
      '--gin.generate.generate.vocabulary=@vocabularies.IdVocabulary()',
      '--gin.vocabularies.IdVocabulary.vocab_size=128',
      '--gin.generate.generate.sampling=@t5x_like.decode.Sampling()',
      '--gin.t5x_like.decode.Sampling.temperature=0.0', '--prompt', ' '.join(map(str, shown)),
      '--new_tokens', str(len(new))], flags={'prompt': str, 'new_tokens': int})
  printed = capsys.readouterr()
  assert status == 0, printed.err
  between = '\n' if reads else ''
  assert printed.out.split('\n---')[0] == between.join(' '.join(map(str, x)) for x in (shown, new))


def test_commands_of_the_documentation(tmp_path):
  root = pathlib.Path(__file__).parent.parent
  shutil.copytree(_LLAMA, tmp_path / 'llama')
  text = (root / 'docs/interchange.md').read_text()
  block = text.split('```bash\n')[1].split('```')[0]
  for line in block.splitlines():
    words = line.split()
    assert words[:3] == ['python', '-m', 't5x_like.convert']
    done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr
  again = (tmp_path / 'llama-again/model.safetensors').read_bytes()
  assert len(again) > 100_000 and (tmp_path / 'runs/llama/model.gin').exists()


def test_settings_and_tokenizer_files_are_kept(tmp_path):
  theirs = _copy(tmp_path)
  names = ('tokenizer.json', 'tokenizer.model')
  for name in names:
    shutil.copy(golden_hf.FOLDER / 'tokenizers' / 'sp_bpe_llama' / name, theirs)
  others = ('generation_config.json', 'chat_template.json', 'sentencepiece.bpe.model')
  for name in others:
    (theirs / name).write_text(f'{{"bos_token_id": 1, "of": "{name}"}}')
  out = pathlib.Path(importing.import_folder(str(theirs), out=str(tmp_path / 'out')))
  for name in (*names, *others, 'config.json'):
    assert (out / 'hf' / name).read_bytes() == (theirs / name).read_bytes()
  assert sorted(p.name for p in out.iterdir()) == ['0', 'hf', 'model.gin']


def test_import_onto_a_mesh_follows_its_shards_and_restores_there(tmp_path, monkeypatch):
  monkeypatch.setattr(arrays, 'SLAB', 1 << 9)
  out = tmp_path / 'out'
  assert _import(str(_LLAMA), '--out', str(out), '--gin_file=runs/convert.gin',
                 '--gin_file=mesh/fsdp_tensor.gin', '--gin.mesh.make_mesh.devices=4') == 0
  written = json.loads((out / '0/state/params.layers.mlp.up.kernel/.zarray').read_text())
  # Two ways fsdp over embed, two ways tensor over mlp, and slabs of 512 bytes.
  assert written['shape'] == [2, 32, 72] and written['chunks'] == [1, 1, 36]
  structure = golden_hf.structure('llama2_gqa', devices=8)
  abstract = {'params': structure.shapes}
  with checkpoints.Checkpointer(out, every=1) as keeper:
    restored = keeper.restore(abstract)
  assert restored is not None
  step, found, extra = restored
  assert step == 0 and extra['imported'] == {
      'family': 'llama', 'model_type': 'llama', 'dtype': 'F32', 'other_dtypes': {}}
  assert toy.tree_equal(found['params'], golden_hf.params('llama2_gqa', structure))


def test_slabs_need_not_divide_a_tensor(tmp_path, monkeypatch):
  monkeypatch.setattr(arrays, 'SLAB', 5 * 72 * 4)
  out = importing.import_folder(str(_LLAMA), out=str(tmp_path / 'out'))
  written = json.loads((tmp_path / 'out/0/state/params.layers.mlp.up.kernel/.zarray').read_text())
  assert written['chunks'] == [1, 5, 72] and written['shape'] == [2, 32, 72]
  structure = golden_hf.structure('llama2_gqa')
  assert toy.tree_equal(checkpoints.load_params(out, structure.shapes),
                        golden_hf.params('llama2_gqa', structure))


def test_dtype_is_that_of_the_files_unless_asked_for(tmp_path):
  theirs, structure = str(golden_hf.FOLDER / 'llama_sharded_bf16'), golden_hf.structure(
      'llama_sharded_bf16')
  cases: list[tuple[importing.DType, str]] = [
      ('as_stored', 'bfloat16'), ('float32', 'float32')]
  for dtype, stored in cases:
    out = importing.import_folder(theirs, out=str(tmp_path / dtype), dtype=dtype)
    abstract = {'params': jax.tree.map(lambda x, d=stored: jax.ShapeDtypeStruct(x.shape, d),
                                       structure.shapes)}
    with checkpoints.Checkpointer(out, every=1) as keeper:
      assert keeper.restore(abstract) is not None


class _Kill(BaseException):
  """Stands for a kill: nothing catches it."""


def _tree(folder: pathlib.Path) -> dict[str, bytes]:
  # Orbax writes the time of the checkpoint into the rest.
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
          if path.is_file() and not path.name.startswith(('_', 'commit_success'))}


# Places of the end, where a tree of files is moved in several steps.
@pytest.mark.parametrize('name, number', [
    ('rename', 0), ('rename', 5), ('rmdir', 0), ('rename', -1)])
def test_an_import_that_is_killed_while_it_ends_goes_on(tmp_path, monkeypatch, name, number):
  whole = _tree(pathlib.Path(importing.import_folder(str(_LLAMA), out=str(tmp_path / 'whole'))))
  real, out = getattr(os, name), tmp_path / 'out'
  arrays_there = sum(path.endswith('.zarray') for path in whole)
  at, calls = number if number >= 0 else arrays_there, []
  def killed(*args, **kwargs):
    ours = sys._getframe(1).f_globals['__name__'].startswith('t5x_like')
    if ours and len(calls) == at:
      raise _Kill
    calls.extend([args] * ours)
    return real(*args, **kwargs)
  with monkeypatch.context() as patch, pytest.raises(_Kill):
    patch.setattr(os, name, killed)
    importing.import_folder(str(_LLAMA), out=str(out))
  assert not out.exists()
  importing.import_folder(str(_LLAMA), out=str(out))
  assert _tree(out) == whole and sorted(os.listdir(tmp_path)) == ['out', 'whole']


def test_a_full_disk_is_told_in_one_message_and_costs_no_finished_tensor(
    tmp_path, monkeypatch, capsys):
  full = ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device '
                    "[os_error_code='28']")
  def frame(*args, **kwargs):
    raise full
  with monkeypatch.context() as patch:
    patch.setattr(arrays, 'frame', frame)
    assert _import(str(_LLAMA), '--out', str(tmp_path / 'out')) == 2
  printed = capsys.readouterr().err
  assert 'Traceback' not in printed and (
      f'error: the import into {tmp_path / "out"} ended: No space left on device. Mend that, then '
      f'run the same command again') in printed
  assert _import(str(_LLAMA), '--out', str(tmp_path / 'out')) == 0
  assert 'going on after 21 of 21 tensors' in capsys.readouterr().err


_KILLED = """
import os, signal, sys
from t5x_like.interchange import importing
write, left = importing._Job._write, [int(sys.argv[3])]
def killed(self, place, name):
  if not left[0]:
    os.kill(os.getpid(), signal.SIGKILL)
  left[0] -= 1
  return write(self, place, name)
importing._Job._write = killed
if sys.argv[4] == 'frame':
  importing.modelfile.text = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
importing.import_folder(sys.argv[1], out=sys.argv[2])
"""


@pytest.mark.parametrize('after, where', [(5, 'tensor'), (99, 'frame')])
def test_a_killed_import_goes_on_without_writing_finished_tensors_again(
    tmp_path, after, where, monkeypatch, capsys):
  out = tmp_path / 'out'
  killed = subprocess.run(
      [sys.executable, '-c', _KILLED, str(_LLAMA), str(out), str(after), where],
      env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parent.parent)}, check=False)
  assert killed.returncode == -signal.SIGKILL and not out.exists()
  written, write = [], importing._Job._write
  monkeypatch.setattr(importing._Job, '_write', lambda self, place, name: (
      written.append(name), write(self, place, name))[1])
  importing.import_folder(str(_LLAMA), out=str(out))
  total = len(golden_hf.stored('llama2_gqa'))
  assert len(written) == max(0, total - after)
  assert f'going on after {min(after, total)} of {total} tensors' in capsys.readouterr().err
  structure = golden_hf.structure('llama2_gqa')
  assert toy.tree_equal(checkpoints.load_params(out, structure.shapes),
                        golden_hf.params('llama2_gqa', structure))
  assert os.listdir(tmp_path) == ['out']


def test_an_interrupted_import_of_other_files_starts_over(tmp_path, monkeypatch):
  theirs, out, write = _copy(tmp_path), tmp_path / 'out', importing._Job._write
  def fails(self, place, name):
    raise OSError('disk full')
  monkeypatch.setattr(importing._Job, '_write', fails)
  with pytest.raises(OSError, match='disk full'):
    importing.import_folder(str(theirs), out=str(out))
  assert not out.exists() and (tmp_path / 'out.partial').exists()
  (theirs / 'model.safetensors').touch()
  written = []
  monkeypatch.setattr(importing._Job, '_write', lambda self, place, name: (
      written.append(name), write(self, place, name))[1])
  importing.import_folder(str(theirs), out=str(out))
  assert len(written) == len(golden_hf.stored('llama2_gqa'))
