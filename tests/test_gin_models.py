"""Named models: what a file configures has the parameters that were published."""

import math

import jax
import published
import pytest
from flax import nnx

from models.hf import family
from t5x_like import config

# What files of weights are read as, where that is not the first part of a model's name. GPT-3 has
# none; it is a GPT-2 in all that shapes it.
_FAMILIES = {'gpt3': 'gpt2', 'llama2': 'llama', 'llama3': 'llama', 'pythia': 'gpt_neox',
             'dolly': 'gpt_neox', 'gemma3': 'gemma3_text', 'bark': 'bark_semantic'}


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
  assert count == wanted.count, f'{name}: {count:,} instead of {wanted.count:,} ({wanted.source})'


@pytest.mark.parametrize('name', [n for n, model in published.MODELS.items() if model.printed])
def test_counts_round_to_what_is_printed(name):
  wanted = published.MODELS[name]
  digits, unit = wanted.printed[:-1], {'M': 1e6, 'B': 1e9}[wanted.printed[-1]]
  places = len(digits.partition('.')[2])
  assert f'{wanted.count / unit:.{places}f}' == digits


# One more has a published shape, but no published count.
@pytest.mark.parametrize('name', [*published.MODELS, 'mpt_125m'])
def test_configuration_is_one_of_its_family(name):
  made, first = _model(name, 50368), name.split('_')[0]
  wanted = _FAMILIES.get(first, first)
  assert wanted in [found.name for found in family.of_config(made.config)]
