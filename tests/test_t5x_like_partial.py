"""Partial restores: every parameter is restored, initialised or refused, and told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from models.config import DecoderConfig
from models.decoder import DecoderLM
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import checkpoints, config, partial, state


def _model(**change) -> DecoderLM:
  sizes = {'vocab': 32, 'embed': 16, 'layers': 2, 'heads': 2, 'mlp': 24, **change}
  return DecoderLM(config=DecoderConfig(**sizes))


def _params(model: DecoderLM, seed: int, devices: int = 1):
  structure = state.describe(model, mesh_lib.make_mesh(devices=devices), rules_lib.fsdp())
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jax.device_put(jnp.asarray(
      draw.normal(size=x.shape), x.dtype), x.sharding), structure.shapes)


@pytest.fixture
def saved(tmp_path):
  params = _params(_model(), seed=0)
  with checkpoints.Checkpointer(tmp_path / 'run', every=1, mode='sync') as keeper:
    keeper.save(1, {'params': params, 'step': jnp.int32(1)}, extra={})
  return str(tmp_path / 'run'), params


def test_a_tied_model_takes_the_body_of_an_untied_one(saved, capsys):
  path, source = saved
  mine = _params(_model(embeddings='tied', qk_norm='head'), seed=1, devices=2)
  kept = np.asarray(mine['layers']['attention']['query_norm']['scale'])
  found = partial.Partial(checkpoint=path)(mine)
  for name in ('embed', 'norm'):
    assert toy.tree_equal(found[name], source[name])
  assert toy.tree_equal(found['layers']['mlp'], source['layers']['mlp'])
  assert toy.tree_equal(found['layers']['attention']['query_norm'], {'scale': kept})
  where = lambda tree: tree['layers']['mlp']['up']['kernel'].sharding
  assert where(found) == where(mine)
  told = capsys.readouterr().err
  assert 'restored    embed/embedding <- embed/embedding' in told
  name = 'layers/attention/query_norm/scale'
  assert f'initialised {name} <- {name} (not in the checkpoint)' in told


def test_rules_rename_and_the_first_that_matches_decides(saved):
  path, source = saved
  mine = _params(_model(), seed=1)
  rules = [('layers/norm1/scale', 'layers/norm2/scale'), ('head/.*', None),
           ('(layers|embed|norm)/(.*)', r'\1/\2')]
  found = partial.Partial(checkpoint=path, rules=rules)(mine)
  assert toy.tree_equal(found['layers']['norm1'], source['layers']['norm2'])
  assert toy.tree_equal(found['head'], mine['head'])
  assert toy.tree_equal(found['layers']['mlp'], source['layers']['mlp'])


def test_another_shape_is_refused_or_initialised_as_asked(saved, capsys):
  path, source = saved
  mine = _params(_model(vocab=40), seed=1)
  with pytest.raises(ValueError) as error:
    partial.Partial(checkpoint=path)(mine)
  for line in ('refused     embed/embedding <- embed/embedding ([32, 16] there, [40, 16] here)',
               'refused     head/kernel'):
    assert line in str(error.value)
  found = partial.Partial(checkpoint=path, refused='initialise')(mine)
  assert toy.tree_equal(found['embed'], mine['embed'])
  assert toy.tree_equal(found['layers'], source['layers'])


def test_what_has_no_effect_is_refused(saved):
  path, _ = saved
  mine = _params(_model(), seed=1)
  with pytest.raises(ValueError, match=r"rules without effect.*\['layer/\.\*'\]"):
    partial.Partial(checkpoint=path, rules=[('layer/.*', None), ('(.*)', r'\1')])(mine)
  with pytest.raises(ValueError, match='no rule restores anything'):
    partial.Partial(checkpoint=path, rules=[('.*', None)])(mine)
  with pytest.raises(ValueError, match=r'no complete checkpoint of step 7 .*there are \[1\]'):
    partial.Partial(checkpoint=path, step=7)(mine)
  with pytest.raises(ValueError, match='has no ema; it has params, step'):
    partial.Partial(checkpoint=path, which='ema')(mine)


@pytest.mark.parametrize('rules, message', [
    ([('(', r'\1')], r"'\(' is no regex: missing \)"),
    ([('(.*)', r'\2')], r'invalid group reference 2.*numbered from 1'),
    ([('a', 'b', 'c')], r"\('a', 'b', 'c'\) is no rule; they are a list of \(regex"),
    ([('.*', 3)], r"\('.*', 3\) is no rule"), ('head/.*', "rules='head/.*': must be a list"),
])
def test_what_is_no_rule_is_named(saved, rules, message):
  path, _ = saved
  with pytest.raises(ValueError, match=message):
    partial.Partial(checkpoint=path, rules=rules)(_params(_model(), seed=1))


def test_one_checkpoint_is_named_by_its_own_folder_and_what_is_not_used_is_told(saved, capsys):
  path, source = saved
  mine = _params(_model(embeddings='tied'), seed=1)
  found = partial.Partial(checkpoint=f'{path}/1')(mine)
  assert toy.tree_equal(found['embed'], source['embed'])
  assert f'not used of {path}/1: head/kernel' in capsys.readouterr().err


def test_a_run_starts_from_parts_of_another(saved, tmp_path, capsys):
  path, source = saved
  settings = {'MODEL_DIR': f'"{tmp_path / "new"}"', 'SOURCES': '"toy"', 'TRAIN_STEPS': 2,
              'STORE_DIR': f'"{toy.write_store(str(tmp_path / "stores"))}"', 'LENGTH': 8,
              'HOOKS': [], 'WARMUP_STEPS': 1, 'PEAK_LR': 1e-30, 'mesh.make_mesh.devices': 1,
              'train.train.initial': '@t5x_like.partial.Partial()',
              't5x_like.partial.Partial.checkpoint': f'"{path}"',
              't5x_like.partial.Partial.rules': '(("layers/.*", r"\\g<0>"),)',
              **{f'config.DecoderConfig.{name}': getattr(_model().config, name)
                 for name in ('embed', 'layers', 'heads', 'mlp')}}
  assert config.run('t5x_like.train.train', [
      '--gin_file=runs/pretrain.gin', '--gin_file=models/decoder.gin', '--module=t5x_like.partial',
      *(f'--gin.{name}={value}' for name, value in settings.items())]) == 0, capsys.readouterr().err
  assert 'initialised embed/embedding (no rule matches)' in capsys.readouterr().err
  config.clear()
  made = checkpoints.read_manifest(tmp_path / 'new' / '2')['tensors']
  wanted = {f'params/{name}': value for name, value in state.path_dict(source).items()
            if name.startswith('layers/')}
  found = checkpoints.load_tensors(tmp_path / 'new' / '2', wanted, made)
  assert toy.tree_equal(found, wanted)
