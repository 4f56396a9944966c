"""Evaluation as a hook: several in one run are told apart, or refused before anything starts."""

import pytest
import toy

from t5x_like import checks, config, evaluate
from t5x_like.data import eval_loader, textfiles, texttasks


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


def test_different_names_and_equal_entries_pass(tmp_path):
  loader = eval_loader.EvalLoader(sources='toy', store_dir=toy.write_store(tmp_path), batch_size=2,
                                  length=8)
  hooks = [evaluate.Perplexity(loader=loader, every=0, name=name) for name in ('eval', 'train')]
  tasks = [texttasks.TextTask('t', textfiles.Text('a')) for _ in range(2)]
  checks.check_distinct({'hooks': hooks, 'task': tasks, 'steps': 3})
  with pytest.raises(ValueError, match="task holds two TextTask named 't'"):
    checks.check_distinct({'task': [*tasks, texttasks.TextTask('t', textfiles.Text('b'))]})
