"""Settings of every test: eight simulated devices on CPU, strict ranks, no cache between runs, and
code that LLVM leaves unoptimised, which compiles in half the time and computes the same."""

import itertools
import os
import pathlib
import sys
import textwrap

# Before JAX is imported anywhere: it reads these once. Hence the late imports below.
os.environ['JAX_PLATFORMS'] = 'cpu'
for _flag, _value in (('--xla_force_host_platform_device_count', 8),
                      ('--xla_backend_optimization_level', 0)):
  if _flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_flag}={_value}'.strip()
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import pytest  # noqa: E402

from t5x_like import config  # noqa: E402

_COUNT = itertools.count()
_GOLDEN = pathlib.Path(__file__).parent / 'golden'


class Own:
  """A folder with a user's module and its run.gin, known to nothing in this repository.

  Formats as the module's name, which is new in every test: gin never forgets a function.
  """

  def __init__(self, folder: pathlib.Path, capsys):
    self.name, self.folder, self.capsys = f'own{os.getpid()}x{next(_COUNT)}', folder, capsys
    module, run = (_GOLDEN / 'own' / file for file in ('module.py', 'run.gin'))
    (folder / f'{self.name}.py').write_text(module.read_text())
    (folder / 'run.gin').write_text(run.read_text().format(name=self.name))

  def __str__(self) -> str:
    return self.name

  def write(self, file: str, text: str) -> None:
    """Writes a file into the folder."""
    path = self.folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))

  def run(self, *argv: str, function: str = 'train', **how) -> int:
    """Runs a function of the module as its entry would."""
    return config.run(f'{self.name}.{function}', argv, **how)

  def last(self) -> dict:
    """Returns what the module's function was called with."""
    return sys.modules[self.name].CALLS[-1]

  def refused(self, *argv: str, **how) -> str:
    """Runs, demands that it is refused before the call, and returns the message."""
    assert self.run(*argv, **how) == 2
    lines = self.capsys.readouterr().err.split('\n')
    message = '\n'.join(line for line in lines if not line.startswith('note: '))
    assert message.startswith('error: ') and 'Traceback' not in message
    assert not getattr(sys.modules.get(self.name), 'CALLS', [])
    return message


@pytest.fixture
def own(tmp_path, monkeypatch, capsys):
  """A user's module outside the repository, in the current directory."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
  made = Own(tmp_path, capsys)
  yield made
  config.clear()
  sys.modules.pop(made.name, None)
