"""Several processes of one run on this machine: scripts/launch_local, with real processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import toy

from t5x_like import config

_ROOT = pathlib.Path(__file__).parent.parent
_LAUNCH = str(_ROOT / 'scripts/launch_local')
_ODD = ['--gin.MODEL_DIR="gs://b/x y"', "it's", 'a$b `c` \\', '', '*']
_GIN = """
from __gin__ import dynamic_registration
from models import config
from t5x_like import train
include 'runs/pretrain.gin'
include 'models/decoder_tiny.gin'
TRAIN_STEPS = 100
STORE_DIR = '{stores}'
SOURCES = 'toy'
VOCAB_SIZE = 259
BATCH_SIZE = 4
LENGTH = 16
WARMUP_STEPS = 10
SAVE_EVERY = 1000
HOOKS = []
config.DecoderConfig.embed = 16
config.DecoderConfig.layers = 1
config.DecoderConfig.mlp = 32
train.train.log_every = 1
train.train.writers = ('jsonl',)
"""


def _launch(*words: str, **how) -> subprocess.CompletedProcess:
  return subprocess.run([_LAUNCH, *words], capture_output=True, text=True, timeout=60, **how)


def test_each_process_learns_who_it_is_and_marks_its_lines():
  show = 'echo $T5X_LIKE_PROCESS_ID of $T5X_LIKE_PROCESSES at $T5X_LIKE_COORDINATOR; echo bad >&2'
  done = _launch('--processes', '3', '--port', '4567', '--', 'sh', '-c', show)
  assert done.returncode == 0
  assert sorted(done.stdout.splitlines()) == [
    f'[{i}] {i} of 3 at 127.0.0.1:4567' for i in range(3)]
  assert sorted(done.stderr.splitlines()) == ['[0] bad', '[1] bad', '[2] bad']


def test_words_arrive_as_they_were_given_and_the_dry_run_prints_them_for_a_shell():
  code = 'import sys, json; print(json.dumps(sys.argv[1:]))'
  words = ['--processes', '1', '--', sys.executable, '-c', code, *_ODD]
  arrived = json.loads(_launch(*words).stdout.removeprefix('[0] '))
  assert arrived == _ODD
  shown = _launch('--dry_run', *words)
  assert shown.returncode == 0 and shown.stdout.count('\n') == 1
  again = subprocess.run(['sh', '-c', shown.stdout], capture_output=True, text=True)
  assert json.loads(again.stdout) == _ODD, again.stderr


def test_a_process_sees_one_gpu_where_told():
  shown = _launch('--gpu_each', '--dry_run', '--', 'true').stdout.splitlines()
  assert ['JAX_LOCAL_DEVICE_IDS=1' in line for line in shown] == [False, True]


def test_the_first_failure_stops_the_others_with_its_status():
  fail = 'if [ $T5X_LIKE_PROCESS_ID = 1 ]; then exit 7; fi; exec sleep 50'
  began = time.monotonic()
  done = _launch('--', 'sh', '-c', fail)
  assert done.returncode == 7 and time.monotonic() - began < 30
  assert done.stderr == 'error: process 1 failed with exit status 7; stopping the others\n'


def test_a_signal_reaches_every_process_and_their_last_lines_are_shown():
  code = ("trap 'echo saving; exit 143' TERM; echo ready; "
          'while true; do sleep 0.05; done')
  process = subprocess.Popen([_LAUNCH, '--', 'bash', '-c', code], stdout=subprocess.PIPE, text=True)
  assert process.stdout is not None
  lines = [process.stdout.readline() for _ in range(2)]
  assert sorted(lines) == ['[0] ready\n', '[1] ready\n']
  process.send_signal(signal.SIGTERM)
  rest, _ = process.communicate(timeout=30)
  assert sorted(rest.splitlines()) == ['[0] saving', '[1] saving'] and process.returncode == 143


@pytest.mark.parametrize('words, text', [
    ([], 'no command; write it after --'),
    (['--processes', '0', '--', 'true'], "--processes takes a whole number from 1, but got '0'"),
    (['--processes'], '--processes needs a value'),
    (['--hosts', '2'], "unknown option '--hosts'; see scripts/launch_local --help"),
])
def test_refusals(words, text):
  done = _launch(*words)
  assert done.returncode == 2 and done.stderr.startswith(f'error: {text}'), done.stderr


def test_explains_itself():
  done = _launch('--help')
  assert done.returncode == 0 and done.stdout.startswith('Starts a command as several processes')
  assert '--gpu_each' in done.stdout and 'set -euo' not in done.stdout


def _environment() -> dict[str, str]:
  return {**os.environ, **toy.ONE_DEVICE, 'PYTHONPATH': str(_ROOT)}


def _losses(run: pathlib.Path) -> list[float]:
  records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  assert [record['step'] for record in records] == list(range(1, len(records) + 1))
  return [record['loss'] for record in records]


def test_two_processes_stopped_and_started_again_train_as_one(tmp_path):
  toy.write_store(tmp_path / 'stores')
  (tmp_path / 'run.gin').write_text(_GIN.format(stores=tmp_path / 'stores'))
  one, two = tmp_path / 'one', tmp_path / 'two'
  flags = [f'--gin_file={tmp_path}/run.gin', '--gin.mesh.make_mesh.devices=1']
  assert config.run('t5x_like.train.train', [*flags, f'--gin.MODEL_DIR="{one}"']) == 0
  config.clear()

  words = [_LAUNCH, '--', sys.executable, '-m', 't5x_like.train', flags[0],
           f'--gin.MODEL_DIR="{two}"']
  process = subprocess.Popen(words, env=_environment(), stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 200
  while not (two / 'metrics.jsonl').exists() or not (two / 'metrics.jsonl').stat().st_size:
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=200)
  assert process.returncode == 143, errors[-3000:]
  saved = [int(path.name) for path in two.iterdir() if path.name.isdigit()]
  assert len(saved) == 1 and saved[0] < 100
  for i in range(2):
    assert f'[{i}] stopped by SIGTERM after update {saved[0]};' in errors

  again = subprocess.run(words, env=_environment(), capture_output=True, text=True)
  assert again.returncode == 0, again.stderr[-3000:]
  losses = _losses(two)
  assert len(losses) == 100
  # The sums of two processes are rounded in another order.
  assert losses == pytest.approx(_losses(one), rel=2e-5)
