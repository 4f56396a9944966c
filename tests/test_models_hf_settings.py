"""What a `config.json` says, or leaves unsaid, of each decoder: hyper-parameters of any size."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models import layers, positions
from models.config import DecoderConfig
from models.hf import family as family_lib
from models.hf import names
from models.hf.settings import ACTIVATIONS, Settings


def read(model_type: str, **values) -> DecoderConfig:
  """Our configuration of a file that says this."""
  settings = Settings({'model_type': model_type, **values})
  return family_lib.of_settings(settings.values).read(settings)


# Of every activation that config.json can name, as torch computes it at _AT.
_AT = (-12., -2., -.3, .4, 5., 12.)
_TANH = (0, -0.04540229, -0.1146291, 0.2621612, 5, 12)
_GELU = (0, -0.0455001, -0.1146266, 0.2621687, 4.999999, 12)
_SILU = (-7.373009e-05, -0.2384058, -0.1276672, 0.2394751, 4.966536, 11.99993)
_ACTIVATED = {
    'gelu': _GELU, 'gelu_python': _GELU, 'gelu_10': (*_GELU[:5], 10), 'gelu_accurate': _TANH,
    'gelu_fast': _TANH, 'gelu_new': _TANH, 'gelu_python_tanh': _TANH, 'gelu_pytorch_tanh': _TANH,
    'hardswish': (0, -0.3333333, -0.135, 0.2266667, 5, 12),
    'laplace': (0, 0, 0.0001784265, 0.1381508, 1, 1),
    'leaky_relu': (-0.12, -0.02, -0.003, 0.4, 5, 12), 'linear': _AT,
    'mish': (-7.373032e-05, -0.2525015, -0.1511332, 0.2890305, 4.999552, 12),
    'quick_gelu': (-1.618642e-08, -0.06434137, -0.1125159, 0.2655669, 4.998993, 12),
    'relu': (0, 0, 0, 0.4, 5, 12), 'relu2': (0, 0, 0, 0.16, 25, 144),
    'relu6': (0, 0, 0, 0.4, 5, 6), 'silu': _SILU, 'swish': _SILU,
    'sigmoid': (6.144174e-06, 0.1192029, 0.4255575, 0.5986876, 0.9933072, 0.9999938),
    'sqrtsoftplus': (0.002478748, 0.3562696, 0.7445504, 0.9555183, 2.237569, 3.464103),
    'tanh': (-1, -0.9640276, -0.2913126, 0.379949, 0.9999092, 1),
}


@pytest.mark.parametrize('name', sorted({*_ACTIVATED, *ACTIVATIONS}))
def test_every_activation_is_the_reference_s(name):
  found = layers.ACTIVATIONS[ACTIVATIONS[name]](jnp.asarray(_AT, jnp.float32))
  np.testing.assert_allclose(found, _ACTIVATED[name], rtol=2e-6, atol=2e-7)
  assert ACTIVATIONS[names.ACTIVATIONS[ACTIVATIONS[name]]] == ACTIVATIONS[name]


@pytest.mark.parametrize('model_type, values', [
    ('gpt2', {'n_embd': 15, 'n_head': 3}), ('mpt', {'d_model': 35, 'n_heads': 5}),
    ('semantic', {'hidden_size': 21, 'num_heads': 3}),
    ('falcon', {'hidden_size': 25, 'num_attention_heads': 5, 'alibi': True})])
def test_heads_that_do_not_rotate_may_be_of_odd_width(model_type, values):
  sizes = {'vocab_size': 53, 'n_layer': 2, 'n_layers': 2, 'num_layers': 2, 'num_hidden_layers': 2,
           'n_positions': 20, 'block_size': 20, 'input_vocab_size': 53, 'output_vocab_size': 59}
  assert read(model_type, **sizes, **values).width_of_head % 2 == 1


def test_an_odd_number_of_rotating_dims_is_rounded_up_but_spreads_its_frequencies():
  config = read('gpt_neox', vocab_size=53, hidden_size=36, num_hidden_layers=2, rotary_pct=0.25,
                num_attention_heads=3, intermediate_size=50, rotary_emb_base=100)
  cos, sin = positions.rotary_table(jnp.ones((1, 1), jnp.int32), config.rotary_dim, 100.0)
  angles = np.array([1, 100 ** (-2 / 3)])
  np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), rtol=1e-6)
  np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), rtol=1e-6)
  rotated = positions.rotate(jnp.ones((1, 1, 1, 12)), cos, sin)[0, 0, 0]
  np.testing.assert_allclose(rotated[:4], [*(np.cos(angles) - np.sin(angles)),
                                           *(np.cos(angles) + np.sin(angles))], rtol=1e-5)
  np.testing.assert_array_equal(rotated[4:], 1)


@pytest.mark.parametrize('width, rotary', [(49, 2), (98, 94), (100, 58), (47, 6)])
def test_the_number_of_rotating_dims_survives_being_a_fraction(width, rotary):
  config = read('gptj', vocab_size=53, n_embd=3 * width, n_layer=1, n_head=3, n_positions=20,
                rotary_dim=rotary)
  assert config.rotary_dim == rotary


def test_dims_that_cannot_rotate_are_refused():
  changes: list[dict[str, Any]] = [
      {'rope_fraction': 0.01}, {'head_dim': 5}, {'rope_fraction': 1.5},
      {'rope_fraction': 3 / 8, 'rope_layout': 'neighbours'}]
  for change in changes:
    with pytest.raises(ValueError, match='rope_fraction=.* must '):
      DecoderConfig(vocab=8, embed=16, layers=1, heads=2, mlp=8, **change)
