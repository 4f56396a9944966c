"""Named models: what a file configures has the parameters that were published."""

import math

import jax
import published
import pytest
from flax import nnx

from models.hf import family
from t5x_like import config

# What their files of weights are read as. GPT-3 has none; it is a GPT-2 in all that shapes it.
_FAMILIES = {'gpt3': 'gpt2', 'mpt': 'mpt', 'llama2': 'llama', 'llama3': 'llama',
             'falcon': 'falcon', 'pythia': 'gpt_neox', 'dolly': 'gpt_neox', 'mixtral': 'mixtral',
             'gemma2': 'gemma2', 'qwen3': 'qwen3', 'olmo2': 'olmo2'}


@pytest.fixture(autouse=True)
def forget():
  yield
  config.clear()


def _model(name: str, vocab: int):
  config.load([f'models/{name}.gin'],
              ['published.model.model = %MODEL', f'VOCAB_SIZE = {vocab}'], modules=['published'])
  return config.call('published.model')


@pytest.mark.parametrize('name', published.MODELS)
def test_parameters_are_those_published(name):
  wanted = published.MODELS[name]
  made = _model(name, wanted.vocab)
  shapes = nnx.state(nnx.eval_shape(lambda: made.build(nnx.Rngs(params=0))), nnx.Param)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert abs(count - wanted.count) <= wanted.tolerance * wanted.count, (
    f'{name}: {count:,} instead of {wanted.count:,} ({wanted.source})')


@pytest.mark.parametrize('name', published.MODELS)
def test_configuration_is_one_of_its_family(name):
  made = _model(name, published.MODELS[name].vocab)
  wanted = _FAMILIES[name.split('_')[0]]
  assert wanted in [found.name for found in family.of_config(made.config)]
