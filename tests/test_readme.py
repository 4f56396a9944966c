"""README's commands, run in order as a newcomer would, at toy size in an empty folder."""

import importlib
import pathlib
import re
import shlex

import numpy as np
import pytest

from t5x_like import config

README = pathlib.Path(__file__).parent.parent / 'README.md'
TOY = ['--gin.TRAIN_STEPS=3', '--gin.config.DecoderConfig.embed=16', '--gin.BATCH_SIZE=8',
       '--gin.config.DecoderConfig.layers=1', '--gin.config.DecoderConfig.heads=2',
       '--gin.config.DecoderConfig.mlp=32', '--gin.LENGTH=16', '--gin.WARMUP_STEPS=1',
       '--gin.decode.Samples.new_tokens=4']
FLAGS = {'generate': {'prompt': str, 'new_tokens': int}, 'inspect': {'step': int, 'doc': str}}


def commands():
  blocks = re.findall(r'```bash\n(.*?)```', README.read_text(), re.S)
  return [line for block in blocks for line in block.splitlines() if line.startswith('python -m')]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """An empty folder with some notes in it."""
  (tmp_path / 'notes').mkdir()
  random = np.random.default_rng(0)
  words = ['once', 'upon', 'a', 'time', 'gradient', 'descent', 'went', 'to', 'the', 'sea']
  for i in range(40):
    text = ' '.join(random.choice(words, 200)) + '.\n'
    (tmp_path / 'notes' / f'{i}.txt').write_text(text)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_every_command_of_the_readme_runs(folder, capsys):
  ran = []
  for line in commands():
    words = shlex.split(line)
    module, arguments = words[2], words[3:]
    name = module.rpartition('.')[2]
    if name == 'prepare':
      arguments += ['--gin.VOCAB_SIZE=300', '--gin.VALIDATION_FRACTION=0.2', '--gin.PROCESSES=1']
    elif name == 'train':
      arguments += TOY
    elif name == 'generate':
      arguments += ['--new_tokens', '4']
    importlib.import_module(module)
    status = config.run(f'{module}.{name}', arguments, flags=FLAGS.get(name))
    output = capsys.readouterr()
    assert status == 0, f'{line}\n{output.err}'
    ran.append(name)
  assert ran == ['prepare', 'train', 'train', 'evaluate', 'generate', 'inspect', 'inspect',
                 'report']
  left = {file.name for file in (folder / 'runs' / 'a').iterdir()}
  assert {'3', 'report.md', 'loss_curve.png', 'evaluation.json', 'metrics.jsonl', 'config.gin',
          'model-info.txt', 'ledger.jsonl'} <= left
