"""Every .gin file: models, optimizers and meshes build abstractly, data is read, runs train.

A new file is picked up by its folder; a new folder must be given its way of being tried.
"""

import json
import pathlib
import re

import jax
import published
import pytest
import toy

from t5x_like import config, metrics, preview

# TensorFlow's AutoGraph on Python 3.13, which would give up on a function that warns.
pytestmark = pytest.mark.filterwarnings(
  'ignore:.*got an unexpected keyword argument:DeprecationWarning')

_ROOT = pathlib.Path(__file__).parent.parent
_GIN = _ROOT / 'gin'
_FILES = sorted(str(f.relative_to(_GIN)) for f in _GIN.rglob('*.gin'))
_TINY = 'models/decoder_tiny.gin'


def _in(folder: str) -> list[str]:
  return [name for name in _FILES if name.startswith(f'{folder}/')]


def _text(name: str) -> str:
  return (_GIN / name).read_text(encoding='utf-8')


def _includes(name: str) -> list[str]:
  return re.findall(r"^include '(.*)'", _text(name), re.M)


def _whole(name: str) -> str:
  """The text of all that a file includes, then its own."""
  return ''.join(_whole(other) for other in _includes(name)) + _text(name)

# Those of tests/test_gin_models.py.
_PUBLISHED = [f'models/{name}.gin' for name in published.MODELS]

# Counted by hand from the architectures: vocabulary, then parameters as tables + layers x
# (attention + MLP + norms) + last norm (+ head). None leaves the vocabulary to the data.
_COUNTS = {
  'models/decoder_125m.gin':
    (50304, 50304 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768),
  'models/decoder_350m.gin':
    (50304, 2 * 50304 * 1024 + 24 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024),
  # Queries and outputs of 16 heads, keys and values of 4, 128 wide.
  'models/decoder_1b.gin':
    (50304, 2 * 50304 * 2048
     + 24 * (2 * 2048 * 16 * 128 + 2 * 2048 * 4 * 128 + 3 * 2048 * 5632 + 2 * 2048) + 2048),
  'models/mpt_125m.gin':
    (50368, 50368 * 768 + 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 768) + 768),
  'models/decoder_6m.gin':
    (8192, 2 * 8192 * 256 + 2 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256),
  'models/bench.gin': (512, 2 * 512 * 256 + 4 * (4 * 256**2 + 3 * 256 * 1024 + 2 * 256) + 256),
  'models/moe_tiny.gin':
    (384, 384 * 64 + 2 * (4 * 64**2 + 64 * 4 + 4 * 3 * 64 * 96 + 2 * 64) + 64),
  'models/decoder_tiny.gin':
    (384, 384 * 64 + 2 * (4 * 64**2 + 3 * 64 * 192 + 2 * 64) + 64),
}


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  return toy.write_store(str(tmp_path_factory.mktemp('stores')))


@pytest.fixture(autouse=True)
def forget():
  yield
  config.clear()


def _run_flags(stores, workdir, *files: str, **macros: object) -> tuple[list[str], list[str]]:
  """Files and bindings of a pretraining run on the toy store."""
  settings = {'MODEL_DIR': f'"{workdir}"', 'STORE_DIR': f'"{stores}"', 'SOURCES': '"toy"',
              'TRAIN_STEPS': 1000, 'LENGTH': 16, **macros}
  return ['runs/pretrain.gin', *files], [f'{name} = {value}' for name, value in settings.items()]


def _abstract(monkeypatch, files, bindings) -> dict:
  """Builds a run to its lowered train step; no parameter is made and nothing is compiled."""
  found = {}

  def show(structure, abstract, shapes, lower, *, model, loader, steps):
    found.update(rows=structure.rows(), abstract=abstract, shapes=shapes,
                 text=lower().as_text(), model=model, mesh=structure.mesh)

  monkeypatch.setattr(preview, 'show', show)
  config.load(files, bindings)
  config.call('t5x_like.train.train', action='dry_run')
  return found


def test_every_file_is_tried_in_some_way():
  # Objectives by tests/test_gin_objectives.py.
  tried = {name for folder in ('models', 'objectives', 'optim', 'mesh', 'data', 'runs')
           for name in _in(folder)}
  assert set(_FILES) == tried, 'say in this file how the files of a new folder are tried'
  assert {*_PUBLISHED} <= {*_in('models')}
  assert {'runs/pretrain.gin', _TINY, 'optim/adamw.gin', 'mesh/data.gin'} <= tried


@pytest.mark.parametrize('name', sorted({*_in('models')} - {*_PUBLISHED}))
def test_model_files_build(monkeypatch, stores, tmp_path, name):
  # A file that others include is no model by itself: one that includes it is tried.
  if name not in _COUNTS:
    name = next((other for other in _in('models') if name in _includes(other)), name)
  vocab, count = _COUNTS.get(name, (512, None))
  files, bindings = _run_flags(stores, tmp_path / 'run', name, VOCAB_SIZE=vocab)
  found = _abstract(monkeypatch, files, bindings)
  assert not (tmp_path / 'run').exists()
  assert found['model'].vocab == vocab and found['model'].flops_per_token(16) > 0
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found['abstract']))
  if count is not None:
    assert sum(row['count'] for row in found['rows']) == count


def test_a_file_that_others_include_names_what_a_model_must_add(stores, tmp_path):
  files, bindings = _run_flags(stores, tmp_path, 'models/decoder.gin')
  config.load(files, bindings)
  with pytest.raises(ValueError) as error:
    config.call('t5x_like.train.train', action='dry_run')
  for name in ('embed', 'layers', 'heads', 'mlp'):
    assert f'DecoderConfig.{name} is required and not set' in str(error.value)


@pytest.mark.parametrize('name', _in('optim'))
def test_optimizer_files_build(monkeypatch, stores, tmp_path, name):
  files, bindings = _run_flags(stores, tmp_path, _TINY, name)
  found = _abstract(monkeypatch, files, bindings)
  state = found['abstract']['opt_state']
  assert jax.tree.leaves(state) and found['text'].count('stablehlo') > 100
  bindings.append('PEAK_LR = 0.25')
  config.load(files, bindings)
  rates = []
  monkeypatch.setattr(preview, 'show', lambda *a, **k: None)
  monkeypatch.setattr('t5x_like.step.make', lambda structure, optimizer, *a, **k:
                      rates.append([float(optimizer.learning_rate(s)) for s in (0, 99, 999)]))
  config.call('t5x_like.train.train', action='dry_run')
  # Warmed up over 100 steps to the peak that PEAK_LR sets, and below it at the end.
  [(first, peak, last)] = rates
  assert first == pytest.approx(0.0025, rel=1e-5) and peak == pytest.approx(0.25, rel=1e-5)
  assert last < 0.5 * peak


@pytest.mark.parametrize('name', _in('mesh'))
def test_mesh_files_build(monkeypatch, stores, tmp_path, name):
  files, bindings = _run_flags(stores, tmp_path, _TINY, name)
  found = _abstract(monkeypatch, files, bindings)
  assert found['mesh'].size == jax.device_count() == 8
  rows = next(iter(found['shapes'].values()))
  shard = rows.sharding.shard_shape(rows.shape)
  tensor = found['mesh'].shape['tensor']
  assert shard[0] == rows.shape[0] * tensor // 8
  split = [row['path'] for row in found['rows'] if any(row['spec'])]
  assert bool(split) == (name != 'mesh/data.gin')


_TASK = """
import seqio
import tensorflow as tf

from t5x_like.data import seqio_vocabularies, vocabularies


def _read(split, shuffle_files, seed=None):
  texts = [f'{split}: line {i} of a task of its own' for i in range(40)]
  return tf.data.Dataset.from_tensor_slices({'targets': texts})


_FEATURE = seqio.Feature(seqio_vocabularies.seqio_of(vocabularies.load('bytes')), add_eos=True)
seqio.TaskRegistry.add(
  'gin_files_lines', source=seqio.FunctionDataSource(_read, splits=['train', 'validation']),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={'targets': _FEATURE})
"""


@pytest.fixture
def required(tmp_path, monkeypatch, stores):
  """A value for every macro that a data file may demand."""
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'a.txt').write_text('One document.')
  (tmp_path / 'gin_files_tasks.py').write_text(_TASK)
  monkeypatch.syspath_prepend(str(tmp_path))
  return {'TEXT_DIR': f'"{tmp_path / "text"}"', 'STORE_DIR': f'"{tmp_path / "stores"}"',
          'TASK': '"gin_files_lines"', 'MODULES': "('gin_files_tasks',)"}


def _given(name: str, required: dict[str, str]) -> dict[str, str]:
  """What a file, with all it includes, leaves to the command line."""
  last = dict(re.findall(r'^(\w+) = (\S+)', _whole(name), re.M))
  return {macro: required[macro] for macro, value in last.items()
          if value == '%gin.REQUIRED' or macro == 'MODULES'}


@pytest.mark.parametrize('name', _in('data'))
def test_data_files_are_read(monkeypatch, stores, tmp_path, required, capsys, name):
  given = _given(name, required)
  if 'prepare.prepare:' in _whole(name):
    flags = [f'--gin.{macro}={value}' for macro, value in given.items()]
    assert config.run('t5x_like.prepare.prepare', [f'--gin_file={name}', '--dry_run', *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(r'task \w+: ', printed) and 'to be written' in printed
    assert not (tmp_path / 'stores').exists()
  else:
    files, bindings = _run_flags(stores, tmp_path, _TINY, name, HOOKS=[], **given)
    # Without hooks nothing of a live run reads a store.
    bindings = [b for b in bindings if not b.startswith(('STORE_DIR', 'SOURCES'))]
    found = _abstract(monkeypatch, files, bindings)
    assert {x.shape for x in found['shapes'].values()} == {(8, 16)}


def test_a_live_run_needs_no_store_and_neither_does_generation_from_it(tmp_path, required, capsys):
  given = {'MODEL_DIR': f'"{tmp_path / "run"}"', 'TRAIN_STEPS': 1, **_SMALL,
           'TASK': required['TASK'], 'MODULES': required['MODULES']}
  assert config.run('t5x_like.train.train', [
    '--gin_file=runs/pretrain.gin', f'--gin_file={_TINY}', '--gin_file=data/live.gin',
    *(f'--gin.{k}={v}' for k, v in given.items() if k != 'EVAL_BATCHES')]) == 0
  assert 'embed/embedding' in (tmp_path / 'run/model-info.txt').read_text()
  capsys.readouterr()
  assert config.run('t5x_like.generate.generate', [
    f'--gin_file={tmp_path / "run/config.gin"}', '--prompt', 'line', '--new_tokens', '2'],
    flags={'prompt': str, 'new_tokens': int}) == 0
  assert capsys.readouterr().out.startswith('line')


# One device: eight simulated ones would be compiled for, and other tests do.
_SMALL = {'BATCH_SIZE': 4, 'LENGTH': 16, 'WARMUP_STEPS': 1, 'EVAL_BATCHES': 2,
          'config.DecoderConfig.embed': 16, 'config.DecoderConfig.layers': 1,
          'config.DecoderConfig.heads': 2, 'config.DecoderConfig.mlp': 32,
          'decode.Samples.new_tokens': 3, 'train.train.log_every': 1,
          'mesh.make_mesh.devices': 1}


# Wirings of other commands than train, and the tests that run them.
_ELSEWHERE = {'runs/convert.gin': 'test_t5x_like_interchange_importing.py',
              'runs/generate.gin': 'test_t5x_like_interchange_importing.py'}


@pytest.mark.parametrize('name', _ELSEWHERE)
def test_files_of_other_commands_are_tried_elsewhere(name):
  assert 'train.train.' not in _whole(name)
  assert f'--gin_file={name}' in (_ROOT / 'tests' / _ELSEWHERE[name]).read_text()


@pytest.mark.parametrize('name', [name for name in _in('runs') if name not in _ELSEWHERE])
def test_run_files_train_two_steps(stores, tmp_path, name):
  files = [name, *([_TINY] if '\nMODEL = @' not in _whole(name) else [])]
  settings = {**_SMALL, 'MODEL_DIR': f'"{tmp_path / "run"}"', 'STORE_DIR': f'"{stores}"',
              'SOURCES': '"toy"', 'TRAIN_STEPS': 2}
  assert config.run('t5x_like.train.train', [
    *(f'--gin_file={file}' for file in files), *(f'--gin.{k}={v}' for k, v in settings.items())
  ]) == 0
  records = metrics.read_jsonl(str(tmp_path / 'run/metrics.jsonl'))
  assert metrics.column(records, 'loss')[0] == [1, 2]
  assert 'embed/embedding' in (tmp_path / 'run/model-info.txt').read_text()
  assert json.loads((tmp_path / 'run/evaluation.json').read_text())['bits_per_byte'] > 0
