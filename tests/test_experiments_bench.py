"""The benchmark at toy size: every section runs alone, and its rows agree with each other."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from experiments.bench import report as report_lib
from experiments.bench import run, speed, stores, torch_side
from models.config import DecoderConfig
from t5x_like.data import loader as loader_lib
from t5x_like.data import store

_ROOT = pathlib.Path(__file__).parent.parent
_TOY = ['--quick', '--model', 'decoder_tiny', '--batch_size', '2', '--length', '32', '--dtypes',
        'float32']


def _environment(**more: str) -> dict[str, str]:
  # The tests simulate several devices; the benchmark is about the real one.
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(_ROOT), **more}


def _bench(tmp_path, *flags: str) -> tuple[dict[tuple[str, str], float], str]:
  """The rows of a run by section and name, and what it printed."""
  out = tmp_path / 'bench.json'
  command = [sys.executable, '-m', 'experiments.bench.run', *_TOY, '--out', out, *flags]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment())
  assert done.returncode == 0, done.stderr
  rows = json.loads(out.read_text())['rows']
  return {(row['section'], row['name']): row['value'] for row in rows}, done.stdout


def test_step_and_loop(tmp_path):
  rows, printed = _bench(tmp_path, '--only', 'loop,step')
  flops = rows['step', 'FLOPs/token, 6 x matmul parameters']
  peak = max(rows['step', f'f32 matmul peak {when} the step'] for when in ('before', 'after'))
  speed_of = {which: rows['step', f'f32 tokens/s, {which} step'] for which in ('best', 'median')}
  assert speed_of['best'] >= speed_of['median'] > 0
  assert rows['step', 'f32 step, median'] == pytest.approx(2 * 32 / speed_of['median'] * 1e3)
  share = 100 * speed_of['median'] * flops / (1e9 * peak)
  assert rows['step', 'f32 share of peak, 6 x matmul parameters'] == pytest.approx(share)
  assert rows['step', 'f32 share of peak, with attention'] > share
  update = rows['loop', 'f32 update of the loop, median']
  assert rows['loop', 'f32 tokens/s of the loop'] == pytest.approx(2 * 32 / update * 1e3)
  assert 'f32 overhead of the loop' in printed and printed.index('step:') < printed.index('loop:')


def test_startup(tmp_path):
  rows, _ = _bench(tmp_path, '--only', 'startup')
  assert rows['startup', 'TensorFlow, seqio or PyTorch loaded by it'] == 'no'
  assert 'tensorflow' not in str(rows['startup', 'TensorFlow or PyTorch loaded by a run'])
  first = rows['startup', 'launch to first finished update']
  assert rows['startup', '--help'] < rows['startup', 'import t5x_like.train'] < first
  early, whole = (rows['startup', f'peak RSS {name}']
                  for name in ('up to the first update', 'of the whole run'))
  assert 50 < early <= whole


@pytest.fixture
def environment(tmp_path) -> pathlib.Path:
  """An environment that scripts/setup finds complete, around the interpreter of the tests."""
  minor = f'{sys.version_info[0]}.{sys.version_info[1]}'
  venv = tmp_path / 'venv'
  (venv / 'bin').mkdir(parents=True)
  (venv / f'lib/python{minor}/site-packages').mkdir(parents=True)
  (venv / 'bin/python').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  (venv / 'bin/python').chmod(0o755)
  lock = (_ROOT / f'requirements/lock-{minor}.txt').read_bytes()
  stamp = subprocess.run(['cksum'], input=lock, capture_output=True, check=True).stdout
  (venv / '.stamp-run').write_bytes(stamp)
  return venv


def test_script_measures_the_data_from_anywhere(tmp_path, environment):
  done = subprocess.run([_ROOT / 'scripts/bench', *_TOY, '--only', 'data', '--out', 'data.json'],
                        capture_output=True, text=True, cwd=tmp_path,
                        env=_environment(T5X_LIKE_VENV=str(environment)))
  assert done.returncode == 0, done.stderr
  content = json.loads((tmp_path / 'data.json').read_text())
  rows = {row['name']: row['value'] for row in content['rows']}
  for packing in ('concat', 'pack'):
    assert rows[f'{packing}: tokens/s per core, 16 rows'] > 1000
    assert f'{packing}: opening, first batch of step 10**9' in done.stdout
  assert rows['RSS, 20 sources in one mixture'] >= rows['RSS before opening them'] > 1
  assert content['settings']['only'] == ['data'] and {r['section'] for r in content['rows']} == {
    'machine', 'data'}


def test_import(tmp_path):
  rows, _ = _bench(tmp_path, '--only', 'import')
  # Two tables, and per layer queries and outputs, keys and values, three matrices, two norms.
  count = 2 * 512 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)
  assert rows['import', 'size'] == pytest.approx(2 * count / 1e6)
  assert rows['import', 'speed'] == pytest.approx(
      rows['import', 'size'] / rows['import', 'import, launch to end'])
  assert rows['import', 'peak RSS above an idle process'] < 0.999 * rows['import', 'peak RSS']
  assert rows['import', 'share of what is allowed'] < 100


def test_export(tmp_path):
  rows, _ = _bench(tmp_path, '--only', 'export')
  count = 2 * 512 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)
  assert rows['export', 'size'] == pytest.approx(4 * count / 1e6)
  assert rows['export', 'largest tensor'] == pytest.approx(4 * 512 * 64 / 1e6)
  assert rows['export', 'largest parameter'] == pytest.approx(4 * 2 * 64 * 96 / 1e6)
  assert rows['export', 'peak RSS above an idle process'] < 0.999 * rows['export', 'peak RSS']
  assert rows['export', 'share of what is allowed'] < 100


def test_torch_is_left_out_with_a_reason(tmp_path):
  _, printed = _bench(tmp_path, '--only', 'torch')
  assert 'left out: give --torch_python' in printed
  assert torch_side.unusable(str(tmp_path / 'python')) == (
    f'{tmp_path / "python"} cannot be run: No such file or directory')
  bare = tmp_path / 'bare'
  bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
  bare.chmod(0o755)
  assert "No module named 'torch'" in (torch_side.unusable(str(bare)) or '')


def test_torch_reference_is_the_same_model():
  if torch_side.unusable(sys.executable):
    pytest.skip('this interpreter has no torch')
  shape = DecoderConfig(vocab=64, embed=32, layers=1, heads=2, mlp=48, dtype='float32')
  settings, _ = run.parse([*_TOY, '--vocab', '64', '--torch_python', sys.executable])
  found = torch_side.run(settings, shape, dtype='float32', steps=2)
  assert len(found['times']) == 2 and found['how'] == 'eager' and found['peak'] > 0
  assert found['loss'] == pytest.approx(np.log(64), abs=0.1)
  assert found['parameters'] == shape.matmul_params() + 64 * 32 + (2 + 1) * 32


def test_models_the_reference_does_not_have_are_named():
  like: dict[str, Any] = dict(vocab=8, embed=8, layers=1, heads=2, mlp=8)
  assert torch_side.unlike(DecoderConfig(**like)) is None
  assert torch_side.unlike(DecoderConfig(**like, kv_heads=1, norm='layernorm')) == (
    "norm='layernorm', num_kv_heads=1")


def test_drift_of_the_machine_cancels():
  found = speed.over_neighbours([1.5 * 1.01, 3.0 * 1.01], [1.0, 2.0, 4.0])
  assert found == pytest.approx([1.01, 1.01])


def test_stores_hold_what_was_asked_for(tmp_path):
  for split in ('train', 'validation'):
    stores.write(str(tmp_path), source='a', tokens=5000, vocab=100, split=split)
  opened = store.Store(str(tmp_path / 'a/train'))
  tokens = np.asarray(opened.tokens('targets'))
  assert len(tokens) >= 5000 and tokens.max() == 99 and tokens.min() == opened.eos_id == 1
  assert opened.fingerprint != store.Store(str(tmp_path / 'a/validation')).fingerprint
  batch = loader_lib.Loader(sources='a', store_dir=str(tmp_path), batch_size=2, length=16,
                            seed=0).batch(10 ** 9)
  assert batch['targets'].shape == (2, 16) and batch['loss_weights'].all()


@pytest.mark.parametrize('flags, message', [
  (['--only', 'stp'],
   "'stp' is none of startup, data, import, export, step, loop, torch; did you mean 'step'?"),
  (['--ony', 'step'], "unknown option '--ony'; did you mean '--only'?"),
  (['--dtypes', 'f32'], "'f32' is none of float32, bfloat16"),
  (['--model', 'bnch'], "'bnch' is no file in gin/models; did you mean 'bench'?"),
  (['--batch_size', '0'], "'0' is not a whole number of 1 or more"),
  (['--length', 'long'], "'long' is not a whole number of 1 or more"),
  (['--vocab', '3'], 'argument --vocab: 3 is too few, 8 or more are needed'),
  (['--torch_python', '/nowhere/python'], "'/nowhere/python' is no program that can be run"),
  (['--out', '/nowhere/bench.json'], "'/nowhere/bench.json' cannot be written: give a file in"),
])
def test_bad_options_say_what_is_wrong(capsys, flags, message):
  with pytest.raises(SystemExit) as stopped:
    run.parse(flags)
  assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_sections_run_in_their_order_and_once():
  settings, out = run.parse(['--only', 'torch,step,step'])
  assert settings.only == ('step', 'torch') and out is None
  assert settings.scaled(5, 1) == 5 and run.parse(['--quick'])[0].scaled(5, 1) == 1


def test_report_keeps_finished_sections(tmp_path, capsys):
  path = tmp_path / 'out.json'
  report = report_lib.Report(run.parse([])[0], path=str(path))
  report.section('one', about='first')
  report.add('speed', 1234.5, 'x', note='why')
  report.section('two', about='second')
  saved = json.loads(path.read_text())
  assert saved['rows'] == [
    {'section': 'one', 'name': 'speed', 'value': 1234.5, 'unit': 'x', 'note': 'why'}]
  assert saved['settings']['model'] == 'bench' and report.find('one', 'speed') == 1234.5
  assert '1,234 x' in capsys.readouterr().out and report.find('one', 'other') is None
