"""Each file of gin/objectives trains the model it is for, from the command line."""

import json
import pathlib

import numpy as np
import pytest
import toy

from t5x_like import config, metrics
from t5x_like.data import denoising, loader

_GIN = pathlib.Path(__file__).parent.parent / 'gin'
_MODELS = {'masked_lm': 'bert_base', 'span_corruption': 't5_small', 'prefix_lm': 't5_small',
           'ul2': 't5_small', 'prefix_lm_decoder': 'decoder_tiny'}
_SMALL = {'BATCH_SIZE': 4, 'LENGTH': 24, 'WARMUP_STEPS': 1, 'TRAIN_STEPS': 3, 'SOURCES': '"toy"',
          'config.DecoderConfig.embed': 16, 'config.DecoderConfig.layers': 1,
          'config.DecoderConfig.heads': 2, 'config.DecoderConfig.mlp': 32,
          'config.DecoderConfig.layer_loop': '"unroll"', 'train.train.log_every': 1,
          'mesh.make_mesh.devices': 1, 'EVAL_EVERY': 2}


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
  # That of the next token costs a pass over the logits, and is left to the evaluation.
  assert len(metrics.column(records, accuracy)[1]) == (0 if name == 'prefix_lm_decoder' else 3)
  steps, held_out = metrics.column(records, 'eval/loss')
  assert steps == [2, 3] and np.isfinite(held_out).all()
  during = json.loads((tmp_path / 'run/evaluation.json').read_text())
  assert during['step'] == 3 and 0 <= during[accuracy] <= 1 and 'bits_per_byte' not in during
  ways = [key for key in during if key.startswith('loss/')]
  assert len(ways) == (7 if name == 'ul2' else 0)
  # Afterwards, from the run's own configuration: the same documents, hidden in the same way.
  assert config.run('t5x_like.evaluate.evaluate', [
    f'--gin_file={tmp_path / "run/config.gin"}',
    f'--gin.evaluate.evaluate.workdir="{tmp_path / "after"}"']) == 0
  assert json.loads((tmp_path / 'after/evaluation.json').read_text()) == during
  if name in ('span_corruption', 'prefix_lm_decoder'):
    assert config.run('t5x_like.generate.generate', [
      f'--gin_file={tmp_path / "run/config.gin"}', '--prompt', 'ab', '--new_tokens', '2'],
      flags={'prompt': str, 'new_tokens': int}) == 0


def test_text_without_a_mask_is_refused_with_the_settings_that_give_one(tmp_path):
  stores = toy.write_store(str(tmp_path / 'stores'))
  make = lambda **chosen: loader.Loader(
    sources='toy', store_dir=stores, batch_size=2, length=8, seed=0,
    denoising=denoising.MaskedLM(**chosen))
  with pytest.raises(ValueError, match=r'MaskedLM needs a token that stands .* has neither a mask '
                                       r'nor sentinels: .*EXTRA_IDS=1 .*set MASK_ID to its id'):
    make()
  assert (make(mask_id=2).batch(0)['inputs'] == 2).any()


def test_text_without_sentinels_is_refused_before_anything_is_built(tmp_path, capsys):
  settings = {**_SMALL, 'MODEL_DIR': f'"{tmp_path / "run"}"',
              'STORE_DIR': f'"{toy.write_store(str(tmp_path / "stores"))}"'}
  assert config.run('t5x_like.train.train', [
    '--gin_file=runs/pretrain.gin', '--gin_file=models/t5_small.gin',
    '--gin_file=objectives/span_corruption.gin',
    *(f'--gin.{k}={v}' for k, v in settings.items())]) == 2
  error = capsys.readouterr().err
  assert 'SpanCorruption needs 1 sentinels for rows of 24 tokens, but the vocabulary of' in error
  assert '--gin.EXTRA_IDS=1 or more (prepare.prepare.extra_ids), or shorten LENGTH' in error
  assert not (tmp_path / 'run').exists()
