"""What a `config.json` says, or leaves unsaid, of each decoder: hyper-parameters of any size."""

import dataclasses
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


# What a file means that says no more than its family, by the reference's classes (transformers
# 4.57 and 5.23 agree).
_SILENT = {
    'gpt2': {'vocab': 50257, 'embed': 768, 'layers': 12, 'heads': 12, 'mlp': 3072,
             'max_length': 1024, 'activation': 'gelu_tanh', 'embeddings': 'tied'},
    'gptj': {'vocab': 50400, 'embed': 4096, 'layers': 28, 'heads': 16, 'mlp': 16384,
             'rotary_dim': 64, 'max_length': 2048, 'embeddings': 'untied'},
    'gpt_neox': {'vocab': 50432, 'embed': 6144, 'layers': 44, 'heads': 64, 'mlp': 24576,
                 'rotary_dim': 24, 'activation': 'gelu', 'block': 'parallel_norms'},
    'mpt': {'vocab': 50368, 'embed': 2048, 'layers': 24, 'heads': 16, 'embeddings': 'tied'},
    'falcon': {'vocab': 65024, 'embed': 4544, 'layers': 32, 'heads': 71, 'kv_heads': 1,
               'mlp': 18176, 'block': 'parallel', 'embeddings': 'tied', 'biases': ('norm',)},
    'llama': {'vocab': 32000, 'embed': 4096, 'layers': 32, 'kv_heads': 32, 'mlp': 11008,
              'norm_eps': 1e-6, 'max_length': 2048, 'window': None},
    'mistral': {'kv_heads': 8, 'mlp': 14336, 'norm_eps': 1e-6, 'max_length': 131072,
                'window': 4096, 'local': (True,) * 32},
    'mixtral': {'kv_heads': 8, 'mlp': 14336, 'norm_eps': 1e-5, 'max_length': 131072,
                'window': None, 'rope_theta': 1e6, 'experts': 8, 'experts_per_token': 2},
    'qwen2': {'vocab': 151936, 'kv_heads': 32, 'mlp': 22016, 'max_length': 32768, 'window': None,
              'head_dim': 128, 'biases': ('qkv',)},
    'qwen3': {'vocab': 151936, 'kv_heads': 32, 'head_dim': 128, 'window': None, 'biases': ()},
    'gemma2': {'vocab': 256000, 'embed': 2304, 'layers': 26, 'heads': 8, 'kv_heads': 4,
               'head_dim': 256, 'window': 4096, 'pattern': ('local', 'global'),
               'logit_softcap': 30.0, 'attention_softcap': 50.0, 'attention_scale': 1 / 16,
               'max_length': 8192, 'rope_theta': 1e4, 'embeddings': 'tied'},
    'gemma3_text': {'vocab': 262208, 'window': 4096, 'pattern': ('local',) * 5 + ('global',),
                    'logit_softcap': None, 'attention_softcap': None, 'max_length': 131072,
                    'rope_theta': 1e6, 'local_rope_theta': 1e4, 'local_rope_scaling': None},
    'olmo2': {'vocab': 50304, 'mlp': 11008, 'kv_heads': 32, 'norm_eps': 1e-5, 'max_length': 2048},
    'phi3': {'vocab': 32064, 'embed': 3072, 'mlp': 8192, 'norm_eps': 1e-5, 'max_length': 4096,
             'window': None, 'rope_fraction': 1.0},
    'semantic': {'vocab': 10048, 'out_vocab': 10048, 'embed': 768, 'layers': 12, 'heads': 12,
                 'max_length': 1024, 'embeddings': 'untied', 'biases': ('qkv', 'out', 'mlp',
                                                                        'norm')},
}


@pytest.mark.parametrize('model_type', _SILENT)
def test_what_a_file_does_not_say_is_the_published_default(model_type):
  config = read(model_type)
  assert {name: getattr(config, name) for name in _SILENT[model_type]} == _SILENT[model_type]


def test_null_is_something_else_than_silence():
  assert read('mistral', sliding_window=None).window is None
  assert read('mistral', num_key_value_heads=None).kv_heads == 32
  assert read('mistral', sliding_window=7, layer_types=None).window == 7
  capless = read('gemma2', attn_logit_softcapping=None, final_logit_softcapping=None)
  assert (capless.attention_softcap, capless.logit_softcap) == (None, None)
  assert read('gptj', rotary_dim=None).rotary_dim == 256
  assert read('gpt2', n_inner=None).mlp == 3072
  assert read('llama', head_dim=None, hidden_size=96, num_attention_heads=6).head_dim == 16


def test_qwen_s_window_holds_from_a_layer_on_where_it_is_used():
  said = {'num_hidden_layers': 4, 'num_key_value_heads': 2, 'max_window_layers': 3}
  assert read('qwen2', **said).window is None
  assert read('qwen2', **said, use_sliding_window=True).window == 4096
  found = read('qwen3', **said, use_sliding_window=True, sliding_window=5)
  assert (found.window, found.local) == (5, (False, False, False, True))
  kinds = ['sliding_attention', 'full_attention'] * 2
  assert read('qwen2', **said, use_sliding_window=True, layer_types=kinds).local == (
      True, False, True, False)
  # All 28 layers that max_window_layers means where it is absent are before the fourth.
  del said['max_window_layers']
  assert read('qwen2', **said, use_sliding_window=True, sliding_window=5).window is None


def test_gemma_reads_the_activation_that_its_reference_reads():
  assert read('gemma2', hidden_act='relu').activation == 'gelu_tanh'
  assert read('gemma2', hidden_act='relu', hidden_activation='silu').activation == 'silu'


def test_gemma_3_caps_no_score_as_its_reference():
  assert read('gemma3_text', attn_logit_softcapping=2.0).attention_softcap is None
  assert read('gemma3_text', final_logit_softcapping=2.0).logit_softcap == 2.0
  capped = dataclasses.replace(read('gemma3_text'), attention_softcap=2.0)
  with pytest.raises(ValueError, match='gemma3_text has attention_softcap=None'):
    family_lib.of_settings({'model_type': 'gemma3_text'}).write(capped)


def test_neox_reads_base_and_share_under_its_own_older_names():
  older = read('gpt_neox', rope_theta=7.0, partial_rotary_factor=1.0, rotary_pct=0.5,
               rotary_emb_base=123)
  assert (older.rope_theta, older.rotary_dim) == (123.0, 48)


def test_the_first_files_of_falcon_40b_are_of_the_new_architecture():
  first = {'hidden_size': 64, 'n_head': 8, 'n_layer': 2, 'parallel_attn': True, 'alibi': False}
  config = read('RefinedWeb', **first, n_head_kv=2)
  assert (config.kv_heads, config.block, config.layers) == (2, 'parallel_norms', 2)
  config = read('RefinedWebModel', **first, multi_query=True)
  assert (config.kv_heads, config.block) == (1, 'parallel')


def test_phi3_s_first_length_is_the_one_outside_the_scaling():
  factors = {'short_factor': [1.0] * 48, 'long_factor': [2.0] * 48}
  for kind in ('longrope', 'su', 'yarn'):
    found = read('phi3', max_position_embeddings=16384, rope_scaling={
        'type': kind, 'original_max_position_embeddings': 9, **factors}).rope_scaling
    assert found is not None and found.kind == 'longrope' and found.original_length == 4096
    np.testing.assert_allclose(found.attention_factor, (1 + np.log(4) / np.log(4096)) ** 0.5)
  found = read('phi3', original_max_position_embeddings=16, rope_scaling={
      'type': 'longrope', 'factor': 1.0, **factors}).rope_scaling
  assert found is not None and (found.original_length, found.attention_factor) == (16, 1.0)


def test_local_layers_may_be_scaled_too_and_are_written_back():
  both = {'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 5e5},
          'sliding_attention': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 100.0}}
  config = read('gemma3_text', rope_parameters=both)
  family = family_lib.of_settings({'model_type': 'gemma3_text'})
  assert family.write(config)['rope_parameters'] == both
  row = jnp.arange(4, dtype=jnp.int32)[None]
  _, local = positions.rotary_tables(config, row)
  assert local is not None
  angles = np.arange(4)[:, None] / 2 * 100.0 ** (-np.arange(128) / 128)
  np.testing.assert_allclose(local[0][0, :, 0], np.cos(angles), atol=1e-6)
  with pytest.raises(ValueError, match='older spelling has no scaling of local layers'):
    family.older(family.write(config))


def test_yarn_s_ramp_falls_where_its_ends_have_changed_places():
  said = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 4,
          'truncate': False, 'rope_theta': 100.0}
  config = read('llama', hidden_size=24, num_attention_heads=3, rope_parameters=said)
  assert config.rope_scaling is not None
  plain = positions.frequencies(8, 100.0)
  found = positions.scaled_frequencies(plain, 100.0, config.rope_scaling, jnp.zeros((1, 1), int))
  # The ramp starts at 0 and ends before it, at pair -0.39: no pair is on its upper side.
  np.testing.assert_allclose(found, plain)


@pytest.mark.parametrize('model_type', ['llama', 'mistral', 'qwen3', 'olmo2', 'gemma2', 'falcon'])
def test_a_share_of_rotating_dims_is_refused_where_the_reference_has_none(model_type):
  for said in ({'partial_rotary_factor': 0.5},
               {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}}):
    with pytest.raises(ValueError, match='partial_rotary_factor=0.5 is not supported'):
      read(model_type, **said)


def test_unknown_names_inside_tables_are_named():
  for values, name in (
      ({'model_type': 'mpt', 'attn_config': {'rope': True, 'attn_impl': 'flash'}},
       'attn_config.rope'),
      ({'model_type': 'qwen2', 'rope_scaling': {'type': 'default', 'mrope_section': [1]}},
       'rope_parameters.mrope_section')):
    settings = Settings(values)
    family_lib.of_settings(values).read(settings)
    assert settings.unread() == [name]
    assert settings.said(name) in (True, [1])


@pytest.mark.parametrize('model_type, said', [
    ('falcon', {'apply_residual_connection_post_layernorm': False}),
    ('gptj', {'scale_attn_weights': True, 'rotary': True}),
    ('phi3', {'attention_bias': False, 'full_attn_mod': 1, 'lm_head_bias': False}),
    ('gemma2', {'hidden_act': 'gelu_pytorch_tanh', 'sliding_window_size': 4096}),
    ('mpt', {'tokenizer_name': 'a/b', 'attn_config': {'attn_pdrop': 0, 'output_scores': False}}),
    ('llama', {'repetition_penalty': 1.0, 'bad_words_ids': None})])
def test_what_published_files_say_beyond_the_reference_is_known(model_type, said):
  settings = Settings({'model_type': model_type, **said})
  family_lib.of_settings(settings.values).read(settings)
  assert not settings.unread()


@pytest.mark.parametrize('model_type', ['qwen2', 'olmo2', 'phi3'])
def test_a_width_of_heads_of_its_own_is_written_back(model_type):
  config = read(model_type, head_dim=10, num_key_value_heads=8)
  written = family_lib.of_settings({'model_type': model_type}).write(config)
  assert written['head_dim'] == 10 and read(model_type, **written).head_dim == 10
  usual = family_lib.of_settings({'model_type': model_type}).write(read(model_type))
  assert 'head_dim' not in usual
