"""The flags, files and calls of t5x_like.config, on real gin and a user's own module."""

import os
import pathlib
import subprocess
import sys

import pytest

from t5x_like import config

_ROOT = pathlib.Path(__file__).parent.parent


def test_builds_arguments_from_files_macros_and_command_line(own):
  assert (
    own.run(
      '--gin_file=run.gin',
      '--gin.STEPS=5',
      f'--gin.{own}.adamw.b2=0.5',
      f"--gin.{own}.train.name='x'",
      f'--gin.{own}.train.loader=@{own}.Loader()',
      f'--gin.{own}.Loader.batch_size = 4',
    )
    == 0
  )
  got = own.last()
  assert got['steps'] == 5 and got['name'] == 'x' and got['optimizer'] == ('adamw', 0.1, 0.5)
  assert (got['model'].width, got['loader'].batch_size) == (16, 4)


def test_scopes_separate_two_instances(own):
  assert (
    own.run(
      '--gin_file',
      'run.gin',
      '--gin.STEPS=5',
      f'--gin.{own}.train.loader=@{own}.Loader()',
      f'--gin.{own}.train.eval_loader=@eval/{own}.Loader()',
      f'--gin.{own}.Loader.batch_size=8',
      f'--gin.eval/{own}.Loader.batch_size=4',
    )
    == 0
  )
  assert (own.last()['loader'].batch_size, own.last()['eval_loader'].batch_size) == (8, 4)


def test_functions_are_passed_uncalled_with_their_bindings(own):
  assert (
    own.run(
      '--gin_file=run.gin',
      '--gin.STEPS=5',
      f'--gin.{own}.train.hooks=[@{own}.hook]',
      f'--gin.{own}.hook.every=3',
    )
    == 0
  )
  assert own.last()['hooks'] == [(5, 3)]


def test_later_files_and_bindings_win_and_includes_are_found_beside_the_file(own):
  own.write('sub/more.gin', "include 'base.gin'\nSTEPS = 7\n")
  own.write(
    'sub/base.gin',
    f'from __gin__ import dynamic_registration\nimport {own}\n{own}.train.name = "base"\n',
  )
  assert (
    own.run(
      '--gin_file=run.gin',
      '--gin_file=more.gin',
      '--gin_search_paths=nowhere,sub',
      '--gin.WIDTH=8',
      '--gin.WIDTH=9',
    )
    == 0
  )
  assert (own.last()['steps'], own.last()['name'], own.last()['model'].width) == (7, 'base', 9)


def test_replacing_a_default_that_an_include_sets_is_silent(own, capsys):
  own.write('mine.gin', "include 'run.gin'\nSTEPS = 5\n")
  argv = ['--gin_file=mine.gin', f'--gin.{own}.train.optimizer=@{own}.lion()']
  assert own.run(*argv, f'--gin.{own}.lion.learning_rate=@{own}.cosine()') == 0
  assert capsys.readouterr().err == ''


def test_flags_of_the_entry_arrive_as_arguments(own):
  assert own.run('--gin_file=run.gin', '--gin.STEPS=5', '--step', '3', flags={'step': int}) == 0
  assert own.last()['step'] == 3


def test_flags_of_the_entry_are_read_with_their_type(own, capsys):
  message = own.refused('--gin_file=run.gin', '--step=three', flags={'step': int})
  assert "--step takes int, but got 'three'" in message


def test_dry_run_gets_the_same_arguments(own):
  assert own.run('--gin_file=run.gin', '--gin.STEPS=5', '--dry_run') == 0
  assert own.last()['dry']['steps'] == 5


def test_module_flag_makes_a_module_known_to_bindings(own, tmp_path):
  text = 'def mine(*, scale: float = 1.0): return ("mine", scale)\n'
  own.write('package_of_mine/losses.py', text)
  assert (
    own.run(
      '--gin_file=run.gin',
      '--gin.STEPS=5',
      '--module=package_of_mine.losses',
      f'--gin.{own}.train.optimizer=@package_of_mine.losses.mine()',
      '--gin.package_of_mine.losses.mine.scale=2',
    )
    == 0
  )
  assert own.last()['optimizer'] == ('mine', 2)


def test_settings_displaced_by_the_user_are_noted_not_refused(own, capsys):
  assert (
    own.run(
      '--gin_file=run.gin',
      '--gin.STEPS=5',
      f'--gin.{own}.train.optimizer=@{own}.lion()',
      f'--gin.{own}.lion.learning_rate=@{own}.cosine()',
    )
    == 0
  )
  assert own.last()['optimizer'][0] == 'lion'
  note = capsys.readouterr().err
  assert note.startswith('note: without effect') and f'{own}.adamw.b2 (run.gin:10)' in note


def test_an_include_read_twice_undoes_nothing(own):
  own.write('a.gin', "include 'run.gin'\nWIDTH = 5\n")
  own.write('b.gin', "include 'run.gin'\nSTEPS = 6\n")
  assert own.run('--gin_file=a.gin', '--gin_file=b.gin') == 0
  assert (own.last()['model'].width, own.last()['steps']) == (5, 6)


def test_a_file_may_wire_other_entry_points(own):
  own.write(
    f'{own}_other.py',
    f"""
    import sys
    from t5x_like import config
    def judge(*, model, strict: int = 0): ...
    if __name__ == '__main__':
      sys.exit(config.run('{own}_other.judge'))
  """,
  )
  own.write(
    'wired.gin',
    f"""
    from __gin__ import dynamic_registration
    import {own}
    import {own}_other
    {own}_other.judge.model = @{own}.Model()
    {own}_other.judge.strict = %STRICT
    STRICT = 2
  """,
  )
  assert own.run('--gin_file=run.gin', '--gin_file=wired.gin', '--gin.STEPS=3') == 0
  assert 'STRICT = 2' in config.operative()


def test_operative_config_replays_to_the_same_run(own, tmp_path):
  argv = [
    '--gin_file=run.gin',
    '--gin.STEPS=5',
    f'--gin.{own}.train.hooks=[@late/{own}.hook]',
    f'--gin.late/{own}.hook.every=3',
    f'--gin.{own}.train.loader=@{own}.Loader()',
    f'--gin.{own}.train.options={{"a": 1.5, "b": 2}}',
  ]
  assert own.run(*argv) == 0
  first, written = dict(own.last()), config.record(tmp_path / 'out')
  assert written is not None
  text = config.operative()
  assert own.run(f'--gin_file={written}') == 0
  second = dict(own.last())
  assert config.operative() == text
  for got in (first, second):
    got['loader'] = vars(got['loader'])
  assert first == second
  assert 'every = 3' in text and 'peak = 0.1' in text and 'batch_size = 8' in text


def test_record_keeps_the_earlier_one_and_the_command(own, tmp_path):
  for steps in (5, 5, 6):
    assert own.run('--gin_file=run.gin', f'--gin.STEPS={steps}') == 0
    config.record(tmp_path / 'out')
  assert sorted(os.listdir(tmp_path / 'out')) == ['config-1.gin', 'config.gin']
  command = (tmp_path / 'out/config.gin').read_text().splitlines()[0]
  assert command == f'# python -m {own} --gin_file=run.gin --gin.STEPS=6'


def test_as_a_library_nothing_is_recorded(tmp_path):
  config.clear()
  assert config.operative() == '' and config.record(tmp_path / 'out') is None
  assert not (tmp_path / 'out').exists()


def test_user_errors_are_short_unless_debugging(own, capsys, monkeypatch):
  assert own.run(function='fails') == 2
  assert capsys.readouterr().err == 'error: steps=1 is one too many\n'
  assert own.run('--debug', function='fails') == 2
  assert 'Traceback' in capsys.readouterr().err
  monkeypatch.setenv('T5X_LIKE_DEBUG', '1')
  assert own.run(function='fails') == 2
  assert 'Traceback' in capsys.readouterr().err


def test_errors_in_what_gin_builds_lose_its_noise(own):
  own.write(f'{own}_bad.py', "def bad(*, size: int = 3): raise ValueError(f'size {size} is odd')\n")
  message = own.refused(
    '--gin_file=run.gin',
    '--gin.STEPS=1',
    f'--module={own}_bad',
    f'--gin.{own}.train.optimizer=@{own}_bad.bad()',
  )
  assert message == 'error: size 3 is odd\n'


def test_bugs_keep_their_traceback(own, capsys):
  own.write(f'{own}_bug.py', 'def bug(): return {}["x"]\n')
  assert config.run(f'{own}_bug.bug', []) == 1
  assert 'KeyError' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['gin/runs/x.gin', 'runs/x.gin'])
def test_packaged_files_are_found_last_with_and_without_gin(own, monkeypatch, tmp_path, name):
  own.write('shipped/runs/x.gin', 'STEPS = 11\n')
  monkeypatch.setattr('t5x_like.ginfiles.packaged', lambda: tmp_path / 'shipped')
  assert own.run('--gin_file=run.gin', f'--gin_file={name}') == 0
  assert own.last()['steps'] == 11
  own.write(name, 'STEPS = 12\n')
  assert own.run('--gin_file=run.gin', f'--gin_file={name}') == 0
  assert own.last()['steps'] == 12


def test_gin_decorated_code_of_t5x_users_works(own):
  text = 'import gin\n@gin.configurable\ndef old_loss(scale=1.0): return scale\n'
  own.write(f'{own}_old.py', text)
  own.write('old.gin', f'import {own}_old\nold_loss.scale = 3.0\n')
  assert own.run('--gin_file=run.gin', '--gin_file=old.gin', '--gin.STEPS=1') == 0
  assert sys.modules[f'{own}_old'].old_loss() == 3.0
  assert (
    own.run('--gin_file=run.gin', '--gin_file=old.gin', '--gin.STEPS=1', '--gin.old_loss.scale=4.0')
    == 0
  )
  assert sys.modules[f'{own}_old'].old_loss() == 4.0


def test_a_name_that_files_import_differently_is_refused_on_the_command_line(own):
  own.write('one/parts.py', 'def f(*, x: int = 1): return ("one", x)\n')
  own.write('two/parts.py', 'def g(*, x: int = 1): return ("two", x)\n')
  start = 'from __gin__ import dynamic_registration\n'
  own.write('one.gin', start + 'from one import parts\nparts.f.x = 2\nF = @parts.f()\n')
  own.write(
    'two.gin',
    start + f'from two import parts\nimport {own}\n'
    f'parts.g.x = 3\n{own}.train.optimizer = (%F, @parts.g())\n',
  )
  files = ['--gin_file=run.gin', '--gin_file=one.gin', '--gin_file=two.gin', '--gin.STEPS=1']
  assert own.run(*files) == 0
  assert own.last()['optimizer'] == (('one', 2), ('two', 3))
  assert 'one' in config.operative() and 'two' in config.operative()
  sys.modules[own.name].CALLS.clear()
  message = own.refused(*files, '--gin.parts.f.x=4')
  assert "'parts' is one.parts and two.parts in different files" in message


def test_help_is_printed_without_loading_anything_slow():
  code = (
    'import sys; from t5x_like import config; '
    "status = config.run('t5x_like.train.train', ['--help']);"
    "print('slow:', sorted({'jax', 'numpy', 'tensorflow'} & set(sys.modules))); sys.exit(status)"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=_ROOT)
  assert done.returncode == 0, done.stderr
  assert '--gin_search_paths' in done.stdout and 'python -m t5x_like.train' in done.stdout
  assert 'slow: []' in done.stdout


def test_a_folder_named_gin_does_not_pass_for_the_library(tmp_path):
  (tmp_path / 'gin').mkdir()
  code = (
    f'import sys; sys.path = [{str(tmp_path)!r}, {str(_ROOT)!r}] + [p for p in sys.path if '
    "'site-packages' not in p]; import t5x_like.config"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
  assert (
    'the gin-config library is missing' in done.stderr and 'pip install gin-config' in done.stderr
  )
