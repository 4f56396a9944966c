"""What `pip install .` puts where, and that it works outside the clone."""

import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib

import pytest
import toy

from t5x_like import ginfiles

_ROOT = pathlib.Path(__file__).parent.parent
_LAYERS = ('t5x_like', 'models', 'partitioning', 'experiments')


@pytest.fixture(scope='session')
def installed(tmp_path_factory) -> pathlib.Path:
  """A folder with the package as pip installs it, built from a copy of the sources."""
  source, site = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
  for name in (*_LAYERS, 'gin', 'tests/golden/own', 'scripts'):
    if (_ROOT / name).is_dir():
      shutil.copytree(_ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  for file in _ROOT.glob('*'):
    if file.is_file():
      shutil.copy(file, source)
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-qq', '--no-deps', '--no-build-isolation']
    + ['--no-compile', '--no-index', '--disable-pip-version-check', '--target', site, source],
    check=True,
    capture_output=True,
  )
  return site


def _packages(root: pathlib.Path) -> set[str]:
  inits = (path.parent for name in _LAYERS for path in (root / name).rglob('__init__.py'))
  return {'.'.join(path.relative_to(root).parts) for path in inits}


def _modules(root: pathlib.Path) -> set[str]:
  found = (path for name in _LAYERS for path in (root / name).rglob('*.py'))
  return {str(path.relative_to(root)) for path in found}


def test_every_module_is_installed_and_nothing_else_at_the_top(installed):
  assert _packages(installed) == _packages(_ROOT)
  assert _modules(installed) == _modules(_ROOT)
  tops = {p.name for p in installed.iterdir() if not p.name.endswith(('.dist-info', 'bin'))}
  assert tops == {name for name in _LAYERS if (_ROOT / name / '__init__.py').exists()}


def test_every_gin_file_is_installed_inside_our_package(installed):
  shipped = installed / 't5x_like/gin_files'
  ours = {str(p.relative_to(_ROOT / 'gin')) for p in (_ROOT / 'gin').rglob('*.gin')}
  assert {str(p.relative_to(shipped)) for p in shipped.rglob('*') if p.is_file()} == ours and ours


@pytest.mark.parametrize('name', ['gin/models/decoder.gin', 'models/decoder.gin'])
def test_packaged_gin_files_are_found_away_from_the_clone(installed, tmp_path, name):
  code = f"""
    from t5x_like import config, ginfiles
    import gin
    assert gin.parse_config, 'the library, not a folder of ours'
    print(ginfiles.find({name!r}))
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={'PYTHONPATH': str(installed)},
  )
  assert done.stdout.strip() == str(installed / 't5x_like/gin_files/models/decoder.gin'), (
    done.stderr
  )


def test_entry_points_run_away_from_the_clone(installed, tmp_path):
  for entry in sorted((installed / 't5x_like').glob('*.py')):
    if "__name__ == '__main__'" not in entry.read_text():
      continue
    done = subprocess.run(
      [sys.executable, '-m', f't5x_like.{entry.stem}', '--help'],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env={'PYTHONPATH': str(installed)},
    )
    assert done.returncode == 0 and f'python -m t5x_like.{entry.stem}' in done.stdout, done.stderr


def test_training_runs_away_from_the_clone(installed, tmp_path):
  (tmp_path / 'empty').mkdir()
  stores = toy.write_store(str(tmp_path / 'stores'))
  done = subprocess.run(
    [sys.executable, '-m', 't5x_like.train']
    + ['--gin_file=gin/runs/pretrain.gin', '--gin_file=models/decoder_tiny.gin']
    + ['--gin.MODEL_DIR="run"', f'--gin.STORE_DIR="{stores}"', '--gin.SOURCES="toy"']
    + ['--gin.TRAIN_STEPS=2', '--gin.WARMUP_STEPS=1', '--gin.LENGTH=16', '--gin.BATCH_SIZE=4']
    + ['--gin.decode.Samples.new_tokens=3'],
    capture_output=True,
    text=True,
    cwd=tmp_path / 'empty',
    env={'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  run = tmp_path / 'empty/run'
  assert {'2', 'metrics.jsonl', 'evaluation.json', 'config.gin'} <= {p.name for p in run.iterdir()}
  assert [p.name for p in run.parent.iterdir()] == ['run'] and 'step 2/2' in done.stderr


def test_clone_finds_its_own_gin_files(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert ginfiles.find('gin/models/decoder.gin') == _ROOT / 'gin/models/decoder.gin'


def test_no_python_package_hides_the_gin_library_or_ours():
  assert not list((_ROOT / 'gin').rglob('*.py'))
  assert not list((_ROOT / 'tests').rglob('__init__.py'))


@pytest.mark.parametrize('minor', ['3.11', '3.12', '3.13'])
def test_locks_pin_every_direct_dependency_exactly(minor):
  pins = {}
  for kind in ('lock', 'dev'):
    for line in (_ROOT / f'requirements/{kind}-{minor}.txt').read_text().splitlines():
      if not line.startswith('#'):
        name, equals, version = line.partition('==')
        assert equals and version.strip(), f'{line} is not pinned'
        assert name.lower().replace('_', '-') not in pins, f'{name} is pinned twice'
        pins[name.lower().replace('_', '-')] = version
  text = (_ROOT / 'setup.py').read_text()
  needed = text[text.index('_RUN = [') : text.index(']', text.index('_RUN = ['))]
  names = [name.lower() for name in re.findall(r"'([A-Za-z0-9_-]+)>=", needed)]
  assert len(names) > 10 and not [n for n in names if n.replace('_', '-') not in pins]


def test_python_range_is_the_same_everywhere():
  setup, script = (_ROOT / 'setup.py').read_text(), (_ROOT / 'scripts/setup').read_text()
  assert "python_requires='>=3.11,<3.14'" in setup and '3.11|3.12|3.13)' in script
  tools = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['tool']
  assert tools['ruff']['target-version'] == 'py311' and tools['pyright']['pythonVersion'] == '3.11'


def test_setup_refuses_another_python_clearly(tmp_path):
  fake = tmp_path / 'python'
  fake.write_text('#!/bin/sh\necho 3.9\n')
  fake.chmod(0o755)
  done = subprocess.run(
    [_ROOT / 'scripts/setup'],
    capture_output=True,
    text=True,
    env={'PYTHON': str(fake), 'T5X_LIKE_VENV': str(tmp_path / 'venv'), 'PATH': '/usr/bin:/bin'},
  )
  assert done.returncode == 2 and not (tmp_path / 'venv').exists()
  assert f"needs Python 3.11, 3.12 or 3.13; {fake} is '3.9'" in done.stderr
