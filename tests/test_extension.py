"""A user's own Task, model, optimizer, loss and hook, bound from gin, with no file here touched."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import toy

from t5x_like import config, metrics

_ROOT = pathlib.Path(__file__).parent.parent

_TASKS = '''
"""A seqio Task: lines made by a function, upper case undone by a preprocessor of its own."""

import seqio
import tensorflow as tf

from t5x_like.data import seqio_vocabularies, vocabularies

WORDS = ['RED', 'GREEN', 'BLUE', 'CYAN', 'PINK']


def lines(split, shuffle_files, seed=None):
  count = {'train': 60, 'validation': 10}[split]
  texts = [' '.join(WORDS[(i * j) % 5] for j in range(1, 9)) for i in range(count)]
  return tf.data.Dataset.from_tensor_slices({'targets': texts})


def lower(dataset):
  return dataset.map(lambda x: {'targets': tf.strings.lower(x['targets'])})


seqio.TaskRegistry.add(
  'colours', source=seqio.FunctionDataSource(lines, splits=['train', 'validation']),
  preprocessors=[lower, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={'targets': seqio.Feature(
    seqio_vocabularies.seqio_of(vocabularies.load('bytes')), add_eos=True)})
'''

_PARTS = '''
"""A model, an optimizer, a loss and a hook that share nothing with ours but their shape."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Mixer(nnx.Module):
  """Running means of embedded tokens, then a hidden layer."""

  def __init__(self, vocab, width, rngs):
    draw = lambda *shape: jax.random.normal(rngs.params(), shape) * 0.05
    self.words = nnx.Param(draw(vocab, width), axes=('vocab', 'embed'))
    self.hidden = nnx.Param(draw(width, 2 * width), axes=('embed', 'mlp'))
    self.guess = nnx.Param(draw(2 * width, vocab), axes=('mlp', 'vocab'))

  def __call__(self, inputs, *, positions=None, segment_ids=None, dropout_key=None):
    x = self.words[...][inputs]
    places = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
    mean = jnp.cumsum(x, 1) / places
    return jax.nn.relu((x + mean) @ self.hidden[...]) @ self.guess[...]


@dataclasses.dataclass(frozen=True)
class MixerLM:
  vocab: int
  width: int = 8

  def build(self, rngs):
    return Mixer(self.vocab, self.width, rngs)


def plain(*, rate: float):
  return optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale(-rate))


def squared(module, batch, *, dropout_key=None):
  """Brier's score: the squared distance between the prediction and the target."""
  logits = module(batch['inputs'], segment_ids=batch['segment_ids'])
  wrong = jax.nn.softmax(logits) - jax.nn.one_hot(batch['targets'], logits.shape[-1])
  weights = batch['loss_weights']
  loss, weight = jnp.sum(jnp.square(wrong).sum(-1) * weights), jnp.sum(weights)
  return loss, weight, {'loss': (loss, weight), 'brier': (loss, weight)}


class Watch:
  """Records the largest weight after every update, and what this process has loaded."""

  def __init__(self, *, note: str):
    self.note = note

  def due(self, step, *, last):
    return True

  def __call__(self, run, step, train_state):
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(train_state['params']))
    run.write(step, {'watch/largest': largest})
    if step == run.steps:
      state = jax.tree_util.tree_leaves_with_path(train_state['opt_state'])
      pathlib.Path(run.workdir, 'watch.json').write_text(json.dumps({
          'note': self.note, 'model': type(run.model).__name__, 'optimizer arrays': len(state),
          'text': run.loader.vocabulary().decode(run.loader.batch(0)['targets'][0].tolist()),
          'tensorflow': 'tensorflow' in sys.modules}))
'''

_RUN = """
from __gin__ import dynamic_registration
from lab import parts
from t5x_like import train

include 'runs/pretrain.gin'

MODEL = @parts.MixerLM()
parts.MixerLM.vocab = %VOCAB_SIZE
parts.MixerLM.width = 12
OPTIMIZER = @parts.plain()
parts.plain.rate = 5000.0
HOOKS = [@parts.Watch()]
parts.Watch.note = 'from gin'
train.train.loss = @parts.squared
train.train.log_every = 1
SOURCES = 'colours'
BATCH_SIZE = 4
LENGTH = 32
"""


def _python(folder: pathlib.Path, module: str, *flags: str) -> subprocess.CompletedProcess:
  """Runs a module as a user would who stands in a folder elsewhere."""
  return subprocess.run([sys.executable, '-m', module, *flags], cwd=folder, capture_output=True,
                        text=True, env={**os.environ, **toy.ONE_DEVICE,
                                        'PYTHONPATH': str(_ROOT)})


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  """A user's folder after preparing the Task and training three steps on it."""
  folder = tmp_path_factory.mktemp('outside')
  (folder / 'lab').mkdir()
  for name, text in [('__init__.py', ''), ('tasks.py', _TASKS), ('parts.py', _PARTS),
                     ('run.gin', _RUN)]:
    (folder / 'lab' / name).write_text(text)
  for done in (
      _python(folder, 't5x_like.prepare', '--gin_file=data/seqio.gin', '--gin.TASK="colours"',
              "--gin.MODULES=('lab.tasks',)", '--gin.STORE_DIR="stores"', '--gin.PROCESSES=1'),
      _python(folder, 't5x_like.train', '--gin_file=lab/run.gin', '--gin.MODEL_DIR="run"',
              '--gin.STORE_DIR="stores"', '--gin.TRAIN_STEPS=3')):
    assert done.returncode == 0, done.stderr[-3000:]
  return folder


def test_the_task_became_a_store_by_its_own_preprocessors(lab):
  manifest = json.loads((lab / 'stores/colours/train/manifest.json').read_text())
  assert manifest['task']['name'] == 'colours'
  text = json.loads((lab / 'run/watch.json').read_text())['text']
  assert set(re.findall('[a-z]{3,}', text)) & {'red', 'green', 'blue', 'cyan', 'pink'}
  assert text == text.lower()


def test_the_model_is_the_users(lab):
  lines = (lab / 'run/model-info.txt').read_text().splitlines()[2:-1]
  table = {row[0]: row[1:3] for row in (re.split('  +', line) for line in lines)}
  assert table == {'words': ['384 x 12', 'vocab, embed'], 'hidden': ['12 x 24', 'embed, mlp'],
                   'guess': ['24 x 384', 'mlp, vocab']}


def test_the_loss_is_the_users_and_falls(lab):
  records = metrics.read_jsonl(str(lab / 'run/metrics.jsonl'))
  steps, values = metrics.column(records, 'brier')
  assert steps == [1, 2, 3] and metrics.column(records, 'loss')[1] == values
  # Of an even guess over 384 entries: 1 - 1/384. Cross-entropy would begin at 5.95.
  assert values[0] == pytest.approx(1 - 1 / 384, abs=2e-3) and values[2] < values[1] < values[0]


def test_the_optimizer_is_the_users(lab):
  records = metrics.read_jsonl(str(lab / 'run/metrics.jsonl'))
  assert not metrics.column(records, 'learning_rate')[0], 'plain optax names no learning rate'
  # One momentum per parameter, no second moments and no count.
  assert json.loads((lab / 'run/watch.json').read_text())['optimizer arrays'] == 3


def test_the_hook_was_called_and_training_loaded_no_tensorflow(lab):
  watched = json.loads((lab / 'run/watch.json').read_text())
  assert watched['note'] == 'from gin' and watched['model'] == 'MixerLM'
  assert watched['tensorflow'] is False
  records = metrics.read_jsonl(str(lab / 'run/metrics.jsonl'))
  assert metrics.column(records, 'watch/largest')[0] == [1, 2, 3]


def test_the_operative_config_names_the_users_parts(lab):
  text = (lab / 'run/config.gin').read_text()
  for line in ('from lab import parts', "parts.Watch.note = 'from gin'", 'parts.MixerLM.width = 12',
               'train.train.loss = @parts.squared'):
    assert line in text


def test_a_parameter_without_logical_axes_is_refused_by_name(lab):
  (lab / 'bare').mkdir()
  (lab / 'bare/parts.py').write_text(_PARTS.replace(", axes=('embed', 'mlp')", ''))
  (lab / 'bare/run.gin').write_text(_RUN.replace('from lab', 'from bare'))
  done = _python(lab, 't5x_like.train', '--gin_file=bare/run.gin', '--gin.MODEL_DIR="bad"',
                 '--gin.STORE_DIR="stores"', '--gin.TRAIN_STEPS=3')
  assert done.returncode == 2 and not (lab / 'bad').exists()
  assert 'error: parameter hidden has no logical axes' in done.stderr


def test_what_the_documentation_shows_trains(tmp_path, monkeypatch):
  """docs/extend.md as it stands: its module and its gin file, and two steps."""
  text = (_ROOT / 'docs/extend.md').read_text()
  blocks = re.findall(r'```\w*\n# (my_lab/[\w.]+)\n(.*?)```', text, re.S)
  assert [name for name, _ in blocks] == ['my_lab/parts.py', 'my_lab/run.gin']
  for name, text in [*blocks, ('my_lab/__init__.py', '')]:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  toy.write_store(str(tmp_path / 'stores'))
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  assert config.run('t5x_like.train.train', [
    '--gin_file=my_lab/run.gin', '--gin.MODEL_DIR="run"', '--gin.STORE_DIR="stores"',
    '--gin.SOURCES="toy"', '--gin.TRAIN_STEPS=2', '--gin.LENGTH=16',
    '--gin.train.train.log_every=1', '--gin.parts.sign_descent.rate=0.3']) == 0
  config.clear()
  assert 'kernel  384 x 384' in re.sub('  +', '  ', (tmp_path / 'run/model-info.txt').read_text())
  steps, values = metrics.column(metrics.read_jsonl('run/metrics.jsonl'), 'loss')
  assert steps == [1, 2] and values[1] < values[0]
