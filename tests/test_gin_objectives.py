"""Each file of gin/objectives trains the model it is for, from the command line."""

import pathlib

import numpy as np
import pytest
import toy

from t5x_like import config, metrics

_GIN = pathlib.Path(__file__).parent.parent / 'gin'
_MODELS = {'masked_lm': 'bert_base', 'span_corruption': 't5_small', 'prefix_lm': 't5_small',
           'ul2': 't5_small'}
_SMALL = {'BATCH_SIZE': 4, 'LENGTH': 24, 'WARMUP_STEPS': 1, 'TRAIN_STEPS': 3, 'SOURCES': '"toy"',
          'config.DecoderConfig.embed': 16, 'config.DecoderConfig.layers': 1,
          'config.DecoderConfig.heads': 2, 'config.DecoderConfig.mlp': 32,
          'config.DecoderConfig.layer_loop': '"unroll"', 'train.train.log_every': 1,
          'mesh.make_mesh.devices': 1}


@pytest.fixture(autouse=True)
def forget():
  yield
  config.clear()


def test_every_objective_is_tried():
  assert {f'{name}.gin' for name in _MODELS} == {f.name for f in (_GIN / 'objectives').iterdir()}


@pytest.mark.parametrize('name', _MODELS)
def test_objectives_train_their_model(tmp_path, name):
  settings = {**_SMALL, 'MODEL_DIR': f'"{tmp_path / "run"}"',
              'STORE_DIR': f'"{toy.write_store(str(tmp_path / "stores"), extra_ids=20)}"'}
  assert config.run('t5x_like.train.train', [
    '--gin_file=runs/pretrain.gin', f'--gin_file=models/{_MODELS[name]}.gin',
    f'--gin_file=objectives/{name}.gin', *(f'--gin.{k}={v}' for k, v in settings.items())]) == 0
  records = metrics.read_jsonl(str(tmp_path / 'run/metrics.jsonl'))
  steps, losses = metrics.column(records, 'loss')
  assert steps == [1, 2, 3] and np.isfinite(losses).all()
  accuracy = 'masked_accuracy' if name == 'masked_lm' else 'accuracy'
  assert len(metrics.column(records, accuracy)[1]) == 3


def test_text_without_sentinels_is_refused_before_anything_is_built(tmp_path, capsys):
  settings = {**_SMALL, 'MODEL_DIR': f'"{tmp_path / "run"}"',
              'STORE_DIR': f'"{toy.write_store(str(tmp_path / "stores"))}"'}
  assert config.run('t5x_like.train.train', [
    '--gin_file=runs/pretrain.gin', '--gin_file=models/t5_small.gin',
    '--gin_file=objectives/span_corruption.gin',
    *(f'--gin.{k}={v}' for k, v in settings.items())]) == 2
  assert 'SpanCorruption needs 1 sentinels for rows of 24 tokens' in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()
