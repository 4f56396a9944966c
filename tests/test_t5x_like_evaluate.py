"""Evaluation as a hook: several in one run are told apart, or refused before anything starts."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from partitioning import rules
from t5x_like import checks, config, evaluate, losses, state, train
from t5x_like.data import denoising, eval_loader, textfiles, texttasks


@pytest.mark.parametrize('action', [(), ('--dry_run',)])
def test_two_evaluations_of_one_name_are_refused_before_the_run(tmp_path, capsys, action):
  stores = toy.write_store(tmp_path / 'stores')
  assert config.run('t5x_like.train.train', [
    '--gin_file=runs/quickstart.gin', f'--gin.MODEL_DIR="{tmp_path / "run"}"',
    f'--gin.STORE_DIR="{stores}"', '--gin.SOURCES="toy"',
    '--gin.HOOKS=[@evaluate.Perplexity(), @second/evaluate.Perplexity()]',
    '--gin.second/evaluate.Perplexity.loader=@second/eval_loader.EvalLoader()',
    '--gin.second/eval_loader.EvalLoader.split="train"', *action]) == 2
  error = capsys.readouterr().err
  assert "hooks holds two Perplexity named 'eval', which would write under the same names" in error
  assert "`second/evaluate.Perplexity.name = 'eval_second'`" in error
  assert not (tmp_path / 'run').exists()


def test_two_evaluations_of_one_name_are_refused_in_python_too(stores, tmp_path):
  hooks = [evaluate.Perplexity(loader=hidden(stores, None, batch_size=size), every=0)
           for size in (2, 4)]
  for run in (train.train, train.dry_run):
    with pytest.raises(ValueError, match="hooks holds two Perplexity named 'eval', which would"):
      run(model=toy.model(), loader=toy.Batches(), optimizer=toy.optax.sgd(0.1),
          loss=losses.next_token, mesh=toy.structure().mesh, rules=rules.fsdp_tensor(), steps=1,
          workdir=str(tmp_path / 'run'), hooks=hooks)
  assert not (tmp_path / 'run').exists()


def test_different_names_and_equal_entries_pass(tmp_path):
  loader = eval_loader.EvalLoader(sources='toy', store_dir=toy.write_store(tmp_path), batch_size=2,
                                  length=8)
  hooks = [evaluate.Perplexity(loader=loader, every=0, name=name) for name in ('eval', 'train')]
  tasks = [texttasks.TextTask('t', textfiles.Text('a')) for _ in range(2)]
  checks.check_distinct({'hooks': hooks, 'task': tasks, 'steps': 3})
  with pytest.raises(ValueError, match="task holds two TextTask named 't'"):
    checks.check_distinct({'task': [*tasks, texttasks.TextTask('t', textfiles.Text('b'))]})


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  return toy.write_store(tmp_path_factory.mktemp('stores'), extra_ids=20)


def hidden(stores, objective, **settings):
  return eval_loader.EvalLoader(**{'sources': 'toy', 'store_dir': stores, 'length': 24,
                                   'batch_size': 4, 'denoising': objective, **settings})


@pytest.mark.parametrize('objective', [denoising.MaskedLM(), denoising.SpanCorruption(density=0.5),
                                       denoising.PrefixLM()])
def test_held_out_documents_are_hidden_alike_whatever_the_batch_size(stores, objective):
  loaders = [hidden(stores, objective, batch_size=size) for size in (4, 4, 1)]
  rows = [{name: np.concatenate([loader.batch(i)[name] for i in range(len(loader))])
           for name in loader.spec} for loader in loaders]
  for name, values in rows[0].items():
    np.testing.assert_array_equal(values, rows[1][name])
    np.testing.assert_array_equal(values[:len(rows[2][name])], rows[2][name])
    assert not rows[0]['loss_weights'][len(rows[2][name]):].any()
  other = hidden(stores, objective, seed=1)
  assert any((other.batch(0)[name] != rows[0][name][:4]).any() for name in other.spec)
  assert other.fingerprint != loaders[0].fingerprint != hidden(stores, None).fingerprint
  assert loaders[0].bytes is None and hidden(stores, None).bytes


def test_each_way_of_a_mixture_is_measured_on_all_documents_and_weighs_its_share(stores):
  ways = denoising.Mixture(denoisers=(denoising.SpanCorruption(), denoising.PrefixLM(),
                                      denoising.SpanCorruption(density=0.5)),
                           weights=(3, 1, 0), modes=(7, 8, 9))
  loader = hidden(stores, ways)
  one = lambda way: hidden(stores, denoising.Mixture(denoisers=(way,)))
  alone = {'span_0.15_3': one(denoising.SpanCorruption(targets_length=24)),
           'prefix_0.5': one(denoising.PrefixLM())}
  assert loader.parts == {'span_0.15_3': 0.75, 'prefix_0.5': 0.25}
  assert len(loader) == 2 * len(alone['prefix_0.5'])
  count = len(loader) // 2
  assert [loader.part(i) for i in range(len(loader))] == [n for n in alone for _ in range(count)]
  read = [set(loader.batch(i)['encoder_inputs'][:, 0].tolist()) - {0} for i in (0, count)]
  assert read == [{7}, {8}]
  loader = hidden(stores, denoising.Mixture(denoisers=ways.denoisers, weights=ways.weights))

  def sum_of_ids(module, batch, *, dropout_key):
    assert dropout_key is None
    weights = batch['loss_weights']
    return jnp.sum(batch['targets'] * weights), jnp.sum(weights), {}

  definition = toy.model(vocab=280, layers=1)
  described = toy.structure(definition)
  params = state.initial(definition, described, toy.optax.sgd(0.1), seed=0)['params']
  measure = lambda one: evaluate.Evaluator(described, one, sum_of_ids)(params)
  found, each = measure(loader), {name: measure(one) for name, one in alone.items()}
  for name, one in each.items():
    assert found[f'loss/{name}'] == pytest.approx(one['loss'])
  tokens = [one['tokens'] for one in each.values()]
  assert found['tokens'] == sum(tokens)
  means = [one['loss'] for one in each.values()]
  assert found['loss'] == pytest.approx(np.average(means, weights=np.array([3, 1]) * tokens))
