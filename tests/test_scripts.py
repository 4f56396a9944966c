"""The launchers: the quickstart from its first line to its report, and what it refuses."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import toy

_ROOT = pathlib.Path(__file__).parent.parent
_MINOR = f'{sys.version_info[0]}.{sys.version_info[1]}'

_TINY = ['--gin.config.DecoderConfig.embed=16', '--gin.config.DecoderConfig.layers=1',
         '--gin.config.DecoderConfig.heads=2', '--gin.config.DecoderConfig.mlp=32',
         '--gin.LENGTH=16', '--gin.decode.Samples.new_tokens=4']


@pytest.fixture(scope='module')
def venv(tmp_path_factory):
  """An environment that scripts/setup takes for its own, finished one: it runs this Python."""
  folder = tmp_path_factory.mktemp('venv')
  for made in ('bin', f'lib/python{_MINOR}/site-packages'):
    (folder / made).mkdir(parents=True)
  # Not a link: a linked Python would not find the packages of the environment it comes from.
  (folder / 'bin/python').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  (folder / 'bin/python').chmod(0o755)
  lock = (_ROOT / f'requirements/lock-{_MINOR}.txt').read_bytes()
  done = subprocess.run(['cksum'], input=lock, capture_output=True, check=True)
  (folder / '.stamp-run').write_bytes(done.stdout)
  return folder


def _quickstart(venv, cwd, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run([_ROOT / 'scripts/quickstart', *flags], cwd=cwd, capture_output=True,
                        text=True, env={**os.environ, **toy.ONE_DEVICE, 'T5X_LIKE_VENV': str(venv)})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a folder of notes in it."""
  made = tmp_path_factory.mktemp('quickstart')
  (made / 'notes/more').mkdir(parents=True)
  random = np.random.default_rng(0)
  words = 'the a sea ship wind sail rope crew storm harbour goes comes under over with'.split()
  for i in range(40):
    text = '\n'.join(' '.join(random.choice(words, 9)) + '.' for _ in range(6))
    (made / 'notes' / ('more' if i % 2 else '.') / f'{i}.txt').write_text(text)
  return made


@pytest.fixture(scope='module')
def finished(venv, folder):
  """The quickstart on the notes, named relative to where the user stands."""
  done = _quickstart(venv, folder, '--text', 'notes', '--out', 'mine/run', '--steps', '4',
                     '--vocab', '330', *_TINY)
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def test_quickstart_from_a_folder_of_text(finished, folder):
  run = folder / 'mine/run'
  for file in ('report.md', 'report.json', 'metrics.jsonl', 'config.gin', 'model-info.txt',
               'evaluation.json', 'ledger.jsonl', 'data.json', '4'):
    assert (run / file).exists(), f'{file} is missing; there are {sorted(os.listdir(run))}'
  assert (run / 'loss_curve.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  # Stores lie beside the run, and nothing else does.
  assert sorted(os.listdir(folder / 'mine')) == ['run', 'stores']
  value = json.loads((run / 'evaluation.json').read_text())['bits_per_byte']
  report = (run / 'report.md').read_text()
  assert f'{value:.4f} bits per byte' in report
  for row in ('unigram token model', '`gzip -9`, primed', '`xz -9e`, primed'):
    assert row in report


def test_quickstart_says_what_it_is_doing(finished, folder):
  stages = re.findall(r'^\[\d+:\d\d\] (\d)/5 ', finished.stderr, re.M)
  assert stages == ['1', '2', '3', '4', '5']
  assert re.search(r'step 4/4 \(100.0 %\)  loss \d', finished.stderr)
  assert str(folder / 'mine/run') in finished.stderr and '--- sample after' in finished.stderr
  # What ran beside the training worked, so that the report has not measured it again.
  assert 'baselines failed' not in finished.stderr and 'measuring' not in finished.stderr


def test_quickstart_again_goes_on_where_it_stopped(finished, venv, folder):
  again = _quickstart(venv, folder, '--text', 'notes', '--out', 'mine/run', '--steps', '4',
                      '--vocab', '330', *_TINY)
  assert again.returncode == 0 and 'step 1/4' not in again.stderr
  assert 'reused' in again.stderr


def test_quickstart_on_changed_text_leaves_the_store_of_an_older_run(finished, venv, folder):
  note, stores = folder / 'notes/0.txt', folder / 'mine/stores'
  before, text = set(os.listdir(stores)), note.read_text()
  note.write_text('Quite another text. ' * 9)
  # Stops after the store is written, for a setting that is misspelt.
  done = _quickstart(venv, folder, '--text', 'notes', '--out', 'mine/other', '--vocab', '330',
                     '--gin.LENGHT=16')
  note.write_text(text)
  assert "did you mean 'LENGTH'" in done.stderr
  assert len(set(os.listdir(stores)) - before) == 1 and before < set(os.listdir(stores))
  config = folder / 'mine/run/config.gin'
  look = [sys.executable, '-m', 't5x_like.inspect', f'--gin_file={config}', '--step', '1']
  shown = subprocess.run(look, cwd=_ROOT, capture_output=True, text=True)
  assert shown.returncode == 0 and 'step 1: ' in shown.stdout, shown.stderr
  replaced = subprocess.run(
    [*look, f'--gin.SOURCES="{(set(os.listdir(stores)) - before).pop()}"'], cwd=_ROOT,
    capture_output=True, text=True)
  assert replaced.returncode == 2
  assert 'vocabulary is not the one this run was trained with' in replaced.stderr


@pytest.mark.parametrize('flags, text', [
    (['--text', 'nowhere'], 'error: --text nowhere does not exist'),
    (['--text'], 'error: --text needs a value'),
    (['--steps', 'many'], "error: --steps takes a whole number from 1, but got 'many'"),
    (['--vocab', '0'], "error: --vocab takes a whole number from 1, but got '0'"),
    (['--out', '/dev/null/run'], 'error: --out /dev/null/run cannot be made a folder'),
    (['--fast'], "error: unknown option '--fast'; see scripts/quickstart --help"),
])
def test_quickstart_refuses_before_it_starts(venv, tmp_path, flags, text):
  done = _quickstart(venv, tmp_path, *flags)
  assert done.returncode == 2 and text in done.stderr
  assert '1/5' not in done.stderr and not os.listdir(tmp_path)


def test_quickstart_says_what_to_do_about_too_little_text(venv, tmp_path):
  (tmp_path / 'notes').mkdir()
  for name in ('one', 'two'):
    (tmp_path / f'notes/{name}.txt').write_text(f'Hardly any {name}.')
  done = _quickstart(venv, tmp_path, '--text', 'notes', '--out', 'run')
  assert done.returncode == 2 and '3/5' not in done.stderr
  assert 'cannot train a vocabulary of 4096 pieces on 15 characters' in done.stderr
  assert '--vocab, --separator and --errors' in done.stderr.splitlines()[-1]


def test_quickstart_says_at_once_how_to_cut_one_file(venv, tmp_path):
  (tmp_path / 'all.txt').write_text('\n\n'.join(f'Paragraph {i}.' for i in range(500)))
  done = _quickstart(venv, tmp_path, '--text', 'all.txt', '--out', 'run')
  assert done.returncode == 2 and '3/5' not in done.stderr and 'learning' not in done.stderr
  assert 'is one document (all.txt), and whole documents are held out: cut it' in done.stderr
  assert r"--separator '\n\n' cuts one file into documents" in done.stderr.splitlines()[-1]


def test_quickstart_cuts_one_file_where_told_and_hands_flags_to_the_training(venv, tmp_path):
  documents = [f'Entry {i}: {"the sea and the wind, " * (i % 7 + 1)}' for i in range(60)]
  (tmp_path / 'all.txt').write_text('\n\n'.join(documents))
  done = _quickstart(venv, tmp_path, '--text', 'all.txt', '--separator', r'\n\n', '--vocab', '330',
                     '--out', 'a run', '--gin.LENGHT=16')
  counts = [int(n) for n in re.findall(r'built in .*: (\d+) documents', done.stderr)]
  assert len(counts) == 2 and sum(counts) == 60
  # With a setting that is misspelt, training stops before anything is compiled.
  assert done.returncode == 2 and "did you mean 'LENGTH'" in done.stderr
  assert '5/5' not in done.stderr and os.listdir(tmp_path / 'a run') == ['baselines.log']


def test_quickstart_leaves_files_out_that_are_not_utf8_if_told(venv, tmp_path):
  (tmp_path / 'notes').mkdir()
  for i in range(40):
    text = f'Entry {i}: ' + 'the sea and the wind, ' * (i % 7 + 1)
    (tmp_path / f'notes/{i}.txt').write_text(text)
  (tmp_path / 'notes/bad.txt').write_bytes(b'caf\xe9')
  flags = ('--text', 'notes', '--out', 'run', '--vocab', '300', '--gin.LENGHT=16')
  done = _quickstart(venv, tmp_path, *flags)
  assert 'notes/bad.txt' in done.stderr and "errors='skip'" in done.stderr
  done = _quickstart(venv, tmp_path, *flags, '--errors', 'skip')
  counts = [int(n) for n in re.findall(r'built in .*: (\d+) documents', done.stderr)]
  assert sum(counts) == 40 and "did you mean 'LENGTH'" in done.stderr


def test_quickstart_explains_itself():
  done = subprocess.run([_ROOT / 'scripts/quickstart', '--help'], capture_output=True, text=True)
  assert done.returncode == 0
  for option in ('--text DIR', '--out DIR', '--steps N', '--vocab N', '--separator TEXT',
                 '--errors skip', '--gin'):
    assert option in done.stdout
