"""Each family trains: its own gin file at toy size learns one batch by heart, as a run would.

What is built is what `t5x_like.train` builds of `runs/pretrain.gin`, a file of `gin/models` and one
of `gin/objectives`: model, data, loss, optimizer and train step.
"""

from typing import Any, NamedTuple

import pytest
import toy

from models.hf import family
from t5x_like import config, preview, state, step

_UPDATES = 20


class Toy(NamedTuple):
  """How small a model is made; what is not named here stays as its file says.

  Attributes:
    family: that its configuration is still one of.
    stack: settings of `DecoderConfig`, on top of `_STACK`.
    bindings: others.
    objective: file of gin/objectives; '': the next token.
  """

  family: str
  stack: dict[str, Any]
  bindings: tuple[str, ...] = ()
  objective: str = ''


_EMBED = 32
# Precision, loop and remat belong to no family, and these compile soonest. Learning by heart needs
# no dropout.
_STACK = {'embed': _EMBED, 'layers': 2, 'heads': 4, 'mlp': 4 * _EMBED, 'dropout': 0.0,
          'dtype': "'float32'", 'layer_loop': "'unroll'", 'remat': "'none'"}
_SCALED = {'embed_scale': _EMBED**0.5}
_OUTPUT = (f'encdec.EncDecConfig.output_scale = {_EMBED**-0.5}',)
_QUARTER = {'kv_heads': 1}

TOYS = {
  'gpt2_small': Toy('gpt2', {}),
  'gpt3_125m': Toy('gpt2', {}),
  'gptj_6b': Toy('gptj', {'heads': 2}),
  'pythia_160m': Toy('gpt_neox', {'heads': 2}),
  'dolly_v2_3b': Toy('gpt_neox', {'heads': 2}),
  'mpt_7b': Toy('mpt', {}),
  'falcon_7b': Toy('falcon', {}),
  'falcon_40b': Toy('falcon', {'kv_heads': 2}),
  'llama2_7b': Toy('llama', {}),
  'llama3_8b': Toy('llama', _QUARTER),
  'llama3_1_8b': Toy('llama', _QUARTER, ('config.RopeScaling.original_length = 8',)),
  'mistral_7b': Toy('mistral', {**_QUARTER, 'window': 4}),
  'mixtral_8x7b': Toy('mixtral', {**_QUARTER, 'experts': 4},
                      ('losses.next_token.balance_loss = 0.02',)),
  'qwen2_7b': Toy('qwen2', {**_QUARTER, 'embed': 28, 'heads': 7}),
  'qwen3_8b': Toy('qwen3', {**_QUARTER, 'head_dim': 16}),
  'gemma2_9b': Toy('gemma2', {**_SCALED, 'kv_heads': 2, 'head_dim': 16, 'window': 4}),
  'gemma3_1b': Toy('gemma3_text', {**_SCALED, **_QUARTER, 'head_dim': 16, 'window': 4,
                                   'layers': 6, 'layer_loop': "'scan'"}),
  'olmo2_7b': Toy('olmo2', {}),
  'phi3_mini': Toy('phi3', {'window': 4}),
  'bark_semantic': Toy('bark_semantic', {'out_vocab': 200}),
  'bert_base': Toy('bert', {}, objective='masked_lm'),
  'roberta_base': Toy('roberta', {}, objective='masked_lm'),
  't5_small': Toy('t5', {'head_dim': 8}, _OUTPUT, objective='span_corruption'),
  't5_1_1_small': Toy('t5', {'head_dim': 8}, objective='span_corruption'),
}


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  return toy.write_store(str(tmp_path_factory.mktemp('stores')), extra_ids=20)


@pytest.fixture
def built(monkeypatch, stores, tmp_path, request):
  """What a run of a toy is made of, by its names in `train`."""
  small, found = TOYS[request.param], {}
  given = {'MODEL_DIR': f'"{tmp_path / "run"}"', 'STORE_DIR': f'"{stores}"', 'SOURCES': '"toy"',
           'TRAIN_STEPS': 1000, 'LENGTH': 16, 'BATCH_SIZE': 2, 'HOOKS': '[]', 'WARMUP_STEPS': 1,
           'PEAK_LR': 1e-2, 'mesh.make_mesh.devices': 1,
           **{f'config.DecoderConfig.{k}': v for k, v in (_STACK | small.stack).items()}}
  files = ['runs/pretrain.gin', f'models/{request.param}.gin']
  if small.objective:
    files.append(f'objectives/{small.objective}.gin')
  make = step.make

  def making(structure, optimizer, loss, **settings):
    found['optimizer'] = optimizer
    return make(structure, optimizer, loss, **settings)

  def show(structure, abstract, shapes, lower, *, model, loader, steps):
    found.update(structure=structure, shapes=shapes, lower=lower, model=model, loader=loader)

  monkeypatch.setattr(step, 'make', making)
  monkeypatch.setattr(preview, 'show', show)
  config.load(files, [*(f'{k} = {v}' for k, v in given.items()), *small.bindings])
  config.call('t5x_like.train.train', action='dry_run')
  yield found
  config.clear()


@pytest.mark.parametrize('built, name', [(n, n) for n in TOYS], indirect=['built'], ids=list(TOYS))
def test_a_batch_is_learnt_by_heart(built, name):
  kinds = [found.name for found in family.of_config(built['model'].config)]
  assert TOYS[name].family in kinds
  compiled = built['lower']().compile(compiler_options={'xla_backend_optimization_level': 0})
  batch = step.place(built['loader'], 0, built['shapes'])
  current = state.initial(built['model'], built['structure'], built['optimizer'], seed=0)
  losses = []
  for _ in range(_UPDATES):
    current, metrics = compiled(current, batch)
    losses.append(float(metrics['loss']))
  assert losses[2] < losses[0], losses
  assert losses[-1] < 0.7 * losses[0], losses


def test_every_family_is_tried():
  assert set(family.families()) == {small.family for small in TOYS.values()}
