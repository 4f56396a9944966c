"""One trainer per folder."""

import os
import subprocess
import sys

import pytest

from t5x_like import locks

HOLDER = """
import sys
from t5x_like import locks
with locks.alone(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_refused_by_name_until_the_first_ends(tmp_path):
  root = os.path.dirname(os.path.dirname(__file__))
  with subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)], text=True, cwd=root,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
    assert child.stdout is not None and child.stdout.readline() == 'held\n'
    with pytest.raises(ValueError, match=f'in use by process {child.pid} on .*MODEL_DIR'):
      with locks.alone(str(tmp_path)):
        pass
    child.kill()
    child.wait()
  with locks.alone(str(tmp_path)):
    pass


def test_a_folder_is_free_again_after_an_error(tmp_path):
  with pytest.raises(RuntimeError):
    with locks.alone(str(tmp_path)):
      raise RuntimeError
  with locks.alone(str(tmp_path / 'new')), locks.alone(str(tmp_path)):
    pass
