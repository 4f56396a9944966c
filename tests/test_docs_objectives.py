"""The commands of docs/objectives.md, run in order as a newcomer would, at toy size."""

import importlib
import json
import pathlib
import re
import shlex

import numpy as np

from t5x_like import config
from t5x_like.data import store

PAGE = pathlib.Path(__file__).parent.parent / 'docs/objectives.md'
TOY = ['--gin.TRAIN_STEPS=2', '--gin.config.DecoderConfig.embed=16', '--gin.BATCH_SIZE=4',
       '--gin.config.DecoderConfig.layers=1', '--gin.config.DecoderConfig.heads=2',
       '--gin.config.DecoderConfig.mlp=32', '--gin.LENGTH=32', '--gin.WARMUP_STEPS=1',
       '--gin.mesh.make_mesh.devices=1', '--gin.EVAL_BATCHES=2']


def test_every_command_runs_from_a_folder_of_text(tmp_path, monkeypatch, capsys):
  (tmp_path / 'notes').mkdir()
  random = np.random.default_rng(0)
  words = ['once', 'upon', 'a', 'time', 'gradient', 'descent', 'went', 'to', 'the', 'sea']
  for i in range(20):
    text = ' '.join(random.choice(words, 60)) + '.\n'
    (tmp_path / 'notes' / f'{i}.txt').write_text(text)
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r'```bash\n(.*?)```', PAGE.read_text(), re.S)
  lines = [line for block in blocks for line in block.splitlines() if line.startswith('python -m')]
  assert len(lines) == 5
  for line in lines:
    module, *arguments = shlex.split(line)[2:]
    name = module.rpartition('.')[2]
    if name == 'prepare':
      arguments += ['--gin.VOCAB_SIZE=300', '--gin.VALIDATION_FRACTION=0.2', '--gin.PROCESSES=1']
    elif name == 'train':
      arguments += TOY
    importlib.import_module(module)
    status = config.run(f'{module}.{name}', arguments)
    output = capsys.readouterr()
    assert status == 0, f'{line}\n{output.err}'
    if name == 'evaluate':
      assert 'step 2: loss' in output.out and 'accuracy 0.' in output.out
  assert store.Store('stores/text/train').vocab_size == 400
  for run in ('t5', 'bert'):
    assert json.loads((tmp_path / f'runs/{run}/evaluation.json').read_text())['step'] == 2
