"""The decoder's configuration: errors by name, and counts that agree with the compiler."""

from typing import Any

import jax
import pytest
import toy
from flax import nnx

from models.config import DecoderConfig
from t5x_like import state

GOOD: dict[str, Any] = {'vocab': 64, 'embed': 16, 'layers': 2, 'heads': 4, 'mlp': 32}


@pytest.mark.parametrize('change, text', [
    ({'embed': 18}, r'embed=18 is not divisible by heads=4'),
    ({'kv_heads': 3}, r'heads=4 is not divisible by kv_heads=3'),
    ({'layers': 0}, r'layers must be a positive integer, got 0'),
    ({'activation': 'gleu'}, r"activation='gleu'; allowed: .*did you mean 'gelu'"),
    ({'position': 'ropes'}, r"did you mean 'rope'"),
    ({'biases': ('mpl',)}, r"biases='mpl'.*did you mean 'mlp'"),
    ({'dropout': 1.0}, r'dropout must be in \[0, 1\)'),
    ({'head_dim': 5}, r'rotate an even number of the 5'),
    ({'dtype': 'bfloat'}, r"did you mean 'bfloat16'"),
])
def test_bad_settings_are_refused_by_name(change, text):
  with pytest.raises(ValueError, match=text):
    DecoderConfig(**{**GOOD, **change})


@pytest.mark.parametrize('change', [
    {}, {'kv_heads': 1, 'mlp_form': 'plain'}, {'embeddings': 'tied', 'head_dim': 8}])
def test_matmul_parameters_are_those_of_the_module(change):
  config = DecoderConfig(**{**GOOD, **change})
  made = nnx.eval_shape(lambda: toy.DecoderLM(config=config).build(nnx.Rngs(params=0)))
  sizes = state.path_dict(nnx.to_pure_dict(nnx.state(made, nnx.Param)))
  kernels = sum(x.size for name, x in sizes.items() if name.endswith('kernel'))
  if config.embeddings == 'tied':
    kernels += sizes['embed/embedding'].size
  assert config.matmul_params() == kernels


def test_flops_agree_with_the_compilers_count():
  definition = toy.model(embed=64, heads=4, mlp=256, layers=3, vocab=256)
  described = toy.structure(definition)
  tokens, length = jax.ShapeDtypeStruct((2, 32), 'int32'), 32

  def loss(params, tokens):
    return described.module(params)(tokens).sum()

  cost = jax.jit(jax.grad(loss)).lower(described.shapes, tokens).compile().cost_analysis()
  assert cost is not None
  config = definition.config
  # The plain kernel computes the masked half of the scores too.
  masked = 12 * config.layers * config.heads * config.width_of_head * (length - 1) / 2
  expected = (config.flops_per_token(length) + masked) * 64
  assert abs(cost['flops'] / expected - 1) < 0.1


def test_cache_bytes():
  config = DecoderConfig(**GOOD, kv_heads=2)
  made = toy.DecoderLM(config=config).empty_cache(3, 7)
  assert config.cache_bytes(3, 7) == made.key.nbytes + made.value.nbytes
