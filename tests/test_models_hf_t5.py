"""T5 and mT5 of other settings: which outputs are scaled, whose head it is, forms, defaults."""

import dataclasses

import golden_hf
import numpy as np
import pytest

from models.encdec import EncDecConfig
from models.hf.files import Stored
from models.hf.settings import Settings

_FAMILY = golden_hf.family('t5_v1_0')


def _read(**changes) -> EncDecConfig:
  values = {**golden_hf.settings('t5_v1_0').values, **changes}
  return _FAMILY.read(Settings({name: value for name, value in values.items() if value != 'gone'}))


class _Given(Stored):
  """A tensor that is not in a file."""

  def read(self):
    return np.full((3,), self.start, np.float32)


def _stored(**values: int) -> dict[str, Stored]:
  return {f'{name}.weight': _Given('', 'F32', (3,), value, 0) for name, value in values.items()}


@pytest.mark.parametrize('tied, scaled, kind, wanted', [
    (True, True, 't5', True), (True, False, 't5', False), (False, False, 't5', False),
    (False, True, 't5', True), (True, 'gone', 't5', True), (False, 'gone', 't5', False),
    ('gone', 'gone', 't5', True), ('gone', False, 't5', False), (True, None, 't5', True),
    (True, 'gone', 'mt5', False), (False, 'gone', 'mt5', False), ('gone', True, 'mt5', False),
])
def test_outputs_are_scaled_where_the_file_says_so(tied, scaled, kind, wanted):
  """As transformers 5 reads it: by its own setting, else by that of the tied tables."""
  found = _read(tie_word_embeddings=tied, scale_decoder_outputs=scaled, model_type=kind)
  assert found.output_scale == (32**-0.5 if wanted else 1.0)
  assert (found.decoder.embeddings == 'untied') == (tied is False)
  written = _FAMILY.write(found)
  assert _FAMILY.read(Settings(written)) == found
  if (tied is False) == wanted:
    with pytest.raises(ValueError, match='--spelling=current'):
      _FAMILY.older(written)
  else:
    assert _FAMILY.read(Settings(_FAMILY.older(written))) == found


@pytest.mark.parametrize('values, stored, wanted', [
    # Files of 1.1 that transformers 5 has written again say that the head is tied, and hold it.
    ({'tie_word_embeddings': True, 'scale_decoder_outputs': False}, {'lm_head': 1, 'shared': 2},
     (False, False)),
    ({'tie_word_embeddings': True, 'scale_decoder_outputs': True}, {'lm_head': 1, 'shared': 1},
     None),
    ({'tie_word_embeddings': True}, {'lm_head': 1, 'shared': 2}, (False, True)),
    ({}, {'lm_head': 1, 'shared': 1}, None),
    ({'tie_word_embeddings': False}, {'lm_head': 1, 'shared': 1}, None),
    ({'tie_word_embeddings': False}, {'shared': 1}, (True, False)),
    ({}, {'shared': 1}, None),
    ({'model_type': 'mt5', 'tie_word_embeddings': True}, {'lm_head': 1, 'shared': 2},
     (False, False)),
    ({'model_type': 'mt5', 'tie_word_embeddings': False}, {'shared': 1}, (True, False)),
])
def test_a_head_in_the_file_is_one_of_its_own(values, stored, wanted):
  found = _FAMILY.settle(values, _stored(**stored))
  assert found == ({} if wanted is None else {
      'tie_word_embeddings': wanted[0], 'scale_decoder_outputs': wanted[1]})


@pytest.mark.parametrize('form, wanted', [
    ('relu', ('relu', 'plain')), ('gelu', ('gelu', 'plain')), ('silu', ('silu', 'plain')),
    ('gelu_new', ('gelu_tanh', 'plain')), ('gated-gelu', ('gelu_tanh', 'gated')),
    ('gated-gelu_new', ('gelu_tanh', 'gated')), ('gated-gelu_python', ('gelu', 'gated')),
    ('gated-swish', ('silu', 'gated')), ('gated-silu', ('silu', 'gated')),
    ('gated-quick_gelu', ('quick_gelu', 'gated')), ('gated-relu', ('relu', 'gated')),
])
def test_every_form_of_the_mlp_is_read_and_written(form, wanted):
  found = _read(feed_forward_proj=form, dense_act_fn='gone', is_gated_act='gone')
  assert (found.encoder.activation, found.encoder.mlp_form) == wanted
  assert _FAMILY.read(Settings(_FAMILY.write(found))) == found


def test_the_settings_derived_from_the_form_count_where_they_are_there():
  found = _read(feed_forward_proj='gated-gelu', dense_act_fn='silu', is_gated_act=False).decoder
  assert (found.activation, found.mlp_form) == ('silu', 'plain')
  with pytest.raises(ValueError, match="'gated-prelu' with activation 'prelu' is not supp"):
    _read(feed_forward_proj='gated-prelu', dense_act_fn='gone')


def test_settings_a_file_leaves_out_have_the_values_of_its_library():
  found = [_FAMILY.read(Settings({'model_type': kind})) for kind in ('t5', 'mt5')]
  assert [(c.decoder.vocab, c.decoder.embed, c.decoder.width_of_head, c.decoder.mlp,
           c.encoder.layers, c.decoder.layers, c.decoder.heads, c.decoder.mlp_form)
          for c in found] == [(32128, 512, 64, 2048, 6, 6, 8, 'plain'),
                              (250112, 512, 64, 1024, 8, 8, 6, 'gated')]
  assert all((c.decoder.relative_buckets, c.decoder.relative_distance, c.decoder.norm_eps) ==
             (32, 128, 1e-6) for c in found)
  other = _read(d_model='gone', hidden_size=22, num_decoder_layers=None, num_layers=3, num_heads=5,
                d_kv=3, relative_attention_num_buckets=7, relative_attention_max_distance=5)
  assert (other.encoder.embed, other.decoder.layers, other.decoder.width_of_head) == (22, 3, 3)
  assert dataclasses.replace(other.decoder, relative_buckets=4).relative_distance == 5
