"""The notebooks run from top to bottom at toy size, and are kept without outputs."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sysconfig

import nbclient
import nbformat
import pytest
import toy

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOKS = sorted((_ROOT / 'experiments/notebooks').glob('*.ipynb'))

# pyzmq and the kernel's client leave sockets to the garbage collector.
pytestmark = [pytest.mark.filterwarnings('ignore::ResourceWarning'),
              pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')]


@pytest.mark.parametrize('path', _NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_clean(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert not [cell for cell in code if cell.outputs or cell.execution_count]
  assert sum('parameters' in cell.metadata.get('tags', ()) for cell in code) == 1
  # A reader is told what comes before it is done.
  kinds = [cell.cell_type for cell in notebook.cells]
  assert kinds[0] == 'markdown' and kinds.count('markdown') > len(kinds) // 2


def test_the_quickstart_installs_a_clone_it_finds_and_asks_for_one_otherwise(tmp_path, monkeypatch):
  notebook = nbformat.read(_ROOT / 'experiments/notebooks/quickstart.ipynb', as_version=4)
  first = next(cell.source for cell in notebook.cells if cell.cell_type == 'code')
  commands = []
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(subprocess, 'run', lambda command, check: commands.append(command))
  monkeypatch.chdir(_ROOT / 'experiments/notebooks')
  exec(first, {})
  (tmp_path / 'beside').symlink_to(_ROOT)
  monkeypatch.chdir(tmp_path)
  exec(first, {})
  assert [command[-1] for command in commands] == [str(_ROOT), str(tmp_path / 'beside')]
  (tmp_path / 'beside').unlink()
  with pytest.raises(AssertionError, match='no clone of the repository in or around'):
    exec(first, {})


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """The quickstart's cells after a run on one package of the standard library."""
  folder = tmp_path_factory.mktemp('notebook')
  small = {'TEXT': f'{sysconfig.get_path("stdlib")}/email', 'FOLDER': str(folder / 'out'),
           'VOCABULARY': '600', 'STEPS': '20', 'BATCH': '4', 'LENGTH': '64'}
  changes = {f'QUICKSTART_{name}': value for name, value in small.items()}
  # As where the package is installed: it can be imported, whatever the current folder.
  changes |= {'PYTHONPATH': str(_ROOT), **toy.ONE_DEVICE, 'JAX_NUMPY_RANK_PROMOTION': 'raise',
              'IPYTHONDIR': str(folder / 'ipython')}
  notebook = nbformat.read(_ROOT / 'experiments/notebooks/quickstart.ipynb', as_version=4)
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3',
                                   resources={'metadata': {'path': str(folder)}})
  client.execute(env={**os.environ, **changes})
  return notebook


def _outputs(notebook) -> list:
  return [out for cell in notebook.cells for out in cell.get('outputs', ())]


def _printed(notebook) -> str:
  return ''.join(out.text for out in _outputs(notebook) if out.output_type == 'stream')


def test_the_quickstart_has_no_errors_and_shows_the_loss_curve(executed):
  assert not [out for out in _outputs(executed) if out.output_type == 'error']
  assert sum('image/png' in out.get('data', ()) for out in _outputs(executed)) == 1


def test_the_quickstart_measures_samples_and_inspects(executed):
  text = _printed(executed)
  before = re.search(r'step 1/20 .* loss (\d\.\d+)', text)
  after = re.search(r'after 20 updates the loss is (\d\.\d+)', text)
  assert before and after and float(after[1]) < float(before[1]) - 0.3
  bits = re.search(r'held-out text: (\d\.\d+) bits per byte', text)
  assert bits and 1 < float(bits[1]) < 6
  assert re.search(r'def .*\n---\nimport .*\n---\nThe .*\n---\n', text, re.S)
  assert 'step 0: 4 rows of 64 tokens' in text and re.search(r'\d files were read in step 0', text)
