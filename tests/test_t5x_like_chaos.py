"""The chaos test: a run killed with SIGKILL again and again ends as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import toy

from t5x_like import checkpoints, metrics, optim, schedules, state

STEPS = 240
ROOT = pathlib.Path(__file__).parent.parent
GIN = """
from __gin__ import dynamic_registration
from models import config
from t5x_like import train
from t5x_like.data import loader
include 'runs/pretrain.gin'
include 'models/decoder_tiny.gin'
TRAIN_STEPS = {steps}
STORE_DIR = '{stores}'
SOURCES = {{'a': 3.0, 'b': 1.0}}
VOCAB_SIZE = 259
BATCH_SIZE = 4
LENGTH = 32
WARMUP_STEPS = 10
SAVE_EVERY = 12
EVAL_EVERY = 100
config.DecoderConfig.embed = 32
config.DecoderConfig.mlp = 64
config.DecoderConfig.dropout = 0.1
loader.Loader.packing = 'pack'
loader.Loader.period = 64
train.train.log_every = 1
train.train.writers = ('jsonl',)
"""


def start(folder, gin):
  return subprocess.Popen(
      [sys.executable, '-m', 't5x_like.train', f'--gin_file={gin}',
       f'--gin.MODEL_DIR="{folder}"'], cwd=ROOT,
      env={**os.environ, **toy.ONE_DEVICE, 'PYTHONPATH': str(ROOT)},
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(folder, gin):
  process = start(folder, gin)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return errors


def steps_logged(folder):
  path = folder / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def uncommitted(folder):
  """Whether a checkpoint is being written right now."""
  return any(d.is_dir() and d.name[0].isdigit() and not (d / 'commit_success.txt').exists()
             for d in folder.glob('*'))


def kill_when(folder, gin, condition, pause):
  process = start(folder, gin)
  deadline = time.monotonic() + 200
  while process.poll() is None and not condition():
    assert time.monotonic() < deadline, 'the run made no progress'
    time.sleep(0.001)
  time.sleep(pause)
  caught = uncommitted(folder)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return process.returncode, caught


def test_killed_runs_end_bit_identical(tmp_path):
  for source in 'ab':
    toy.write_store(tmp_path / 'stores', source=source, seed=ord(source))
  gin = tmp_path / 'run.gin'
  gin.write_text(GIN.format(steps=STEPS, stores=tmp_path / 'stores'))
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  finish(whole, gin)

  seed = time.time_ns() % 2**32
  chance = random.Random(seed)
  print('seed of the kills', seed)
  moments, saves_hit, most = 0, 0, 0
  for attempt in range(4):
    before = steps_logged(killed)
    wanted = before + chance.randrange(5, STEPS // 6)
    during_save = attempt % 2 == 1
    ready = (lambda: uncommitted(killed)) if during_save else (
        lambda wanted=wanted: steps_logged(killed) >= wanted)
    code, caught = kill_when(killed, gin, ready, 0.0 if during_save else chance.random() * 0.2)
    moments += code == -signal.SIGKILL
    saves_hit += caught
    most = max(most, steps_logged(killed))
  assert moments == 4, 'a run ended before it was killed'
  assert saves_hit >= 1 and 0 < most < STEPS
  finish(killed, gin)

  both = [[(r['step'], r['loss'], r['grad_norm']) for r in metrics.read_jsonl(
      str(folder / 'metrics.jsonl')) if 'loss' in r] for folder in (whole, killed)]
  assert len(both[0]) == STEPS and both[0] == both[1]
  evaluations = [[r for r in metrics.read_jsonl(str(folder / 'metrics.jsonl'))
                  if 'eval/loss' in r] for folder in (whole, killed)]
  assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]

  described = toy.structure(toy.model(vocab=259, embed=32, layers=2, heads=4, mlp=64,
                                      embeddings='tied'))
  optimizer = optim.adamw(learning_rate=schedules.constant(peak=1e-3))
  states = [checkpoints.Checkpointer(folder, every=1).restore(
      state.abstract(described, optimizer)) for folder in (whole, killed)]
  assert states[0] is not None and states[1] is not None
  assert states[0][0] == states[1][0] == STEPS
  assert toy.tree_equal(states[0][1], states[1][1])
