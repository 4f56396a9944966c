"""docs/families.md: its example is a family, out of tree."""

import importlib
import pathlib
import re

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from models.hf import family as family_lib
from models.hf import files, table, tree
from models.hf.settings import Settings
from partitioning import mesh, rules
from t5x_like import integrity, state

_PAGE = pathlib.Path(__file__).parent.parent / 'docs/families.md'
# As a published file spells it.
_SETTINGS = {
    'model_type': 'stablelm', 'vocab_size': 40, 'hidden_size': 24, 'num_hidden_layers': 2,
    'num_attention_heads': 3, 'num_key_value_heads': 1, 'intermediate_size': 20,
    'hidden_act': 'silu', 'layer_norm_eps': 1e-3, 'max_position_embeddings': 64,
    'rope_theta': 5e3, 'partial_rotary_factor': 0.25, 'use_qkv_bias': True,
    'tie_word_embeddings': False, 'torch_dtype': 'float32', 'hidden_dropout': 0.0}


@pytest.fixture(scope='module')
def stablelm(tmp_path_factory):
  """The page's example, imported as a user's own module."""
  folder = tmp_path_factory.mktemp('lab')
  source = re.search(r'```python\n# my_lab/stablelm.py\n(.*?)```', _PAGE.read_text(), re.S)
  assert source is not None
  (folder / 'lab_stablelm.py').write_text(source[1])
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(folder))
    importlib.import_module('lab_stablelm')
    yield family_lib.of_settings(_SETTINGS)
    family_lib._REGISTERED.pop('stablelm')


def test_it_reads_every_setting_and_writes_them_back(stablelm):
  settings = Settings(_SETTINGS)
  config = stablelm.read(settings)
  assert not settings.unread()
  assert (config.norm, config.norm_eps, config.kv_heads) == ('layernorm', 1e-3, 1)
  assert (config.rope_theta, config.rotary_dim, config.biases) == (5e3, 2, ('qkv', 'norm'))
  assert stablelm.read(Settings(stablelm.write(config))) == config
  assert stablelm.read(Settings(stablelm.older(stablelm.write(config)))) == config
  assert family_lib.of_config(config) == [stablelm]
  with pytest.raises(ValueError, match='qk_layernorm=True is not supported; supported: False'):
    stablelm.read(Settings({**_SETTINGS, 'qk_layernorm': True}))


def test_its_table_covers_a_model_that_computes(stablelm):
  config = golden_hf.in_float32(stablelm.read(Settings(_SETTINGS)))
  made = state.describe(stablelm.model(config=config), mesh.make_mesh(devices=1),
                        rules.data_parallel())
  leaves = golden_hf.leaves(made)
  random = np.random.default_rng(0)
  flat = {path: random.standard_normal(leaf.shape, np.float32) for path, leaf in leaves.items()}
  tensors = dict(tree.to_tensors(stablelm, config, leaves, lambda path, index: flat[path][index]))
  assert 'model.layers.1.self_attn.k_proj.bias' in tensors and 'model.norm.bias' in tensors
  for place in table.places(stablelm.rows(config), leaves):
    for path, value in table.to_ours(place, tensors[place.theirs], leaves):
      np.testing.assert_array_equal(value, flat[path][place.index])
  params = jax.tree.map(jnp.asarray, integrity.nest(flat))
  logits = made.module(params)(jnp.arange(10).reshape(1, 10))
  assert logits.shape == (1, 10, 40) and bool(jnp.isfinite(logits).all())


def test_it_lists_the_named_models_and_no_others():
  table = re.search(r'\| files of `gin/models` \|\n(.*?)\n\n', _PAGE.read_text(), re.S)
  assert table is not None
  # The shape of MPT-125M is published, but no count of it.
  assert set(re.findall(r'`(\w+)`', table[1])) == {*published.MODELS, 'mpt_125m'}


def test_it_says_what_does_not_fit(stablelm):
  config = stablelm.read(Settings(_SETTINGS))
  made = state.describe(stablelm.model(config=config), mesh.make_mesh(devices=1),
                        rules.data_parallel())
  leaves = golden_hf.leaves(made)
  stored = {place.theirs: files.Stored('file', 'F32', place.shape, 0, 0)
            for place in table.places(stablelm.rows(config), leaves)}
  stored['model.layers.0.mlp.gate_projj.weight'] = stored.pop('model.layers.0.mlp.gate_proj.weight')
  stored['model.norm.bias'] = stored['model.norm.bias']._replace(shape=(25,))
  stored['model.norm.weight'] = stored['model.norm.weight']._replace(dtype='I64')
  with pytest.raises(ValueError) as error:
    tree.match(stablelm, stablelm.rows(config), leaves, stored)
  said = str(error.value)
  assert '4 tensors do not fit a stablelm' in said
  assert ('missing: model.layers.0.mlp.gate_proj.weight [20, 24]; did you mean '
          'model.layers.0.mlp.gate_projj.weight?') in said
  assert 'unexpected: model.layers.0.mlp.gate_projj.weight [20, 24]; did you mean' in said
  assert 'shape: model.norm.bias is [25], but config.json makes it [24]' in said
  assert 'dtype: model.norm.weight is I64; parameters are one of F64, F32, F16, BF16' in said
