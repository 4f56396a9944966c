"""How a process learns that it is one of several: from its environment, and never by chance."""

import pathlib
import subprocess
import sys

import pytest

from t5x_like import distributed

_ROOT = pathlib.Path(__file__).parent.parent
_FULL = {'T5X_LIKE_COORDINATOR': '10.0.0.1:8476', 'T5X_LIKE_PROCESSES': '4',
         'T5X_LIKE_PROCESS_ID': '3'}


def test_a_process_alone_waits_for_nobody():
  # Inside a Slurm allocation, too: an interactive shell there is no part of a run.
  slurm = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2',
           'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
  assert distributed.settings({}) is None and distributed.settings(slurm) is None
  assert distributed.settings({name: '' for name in _FULL}) is None


def test_settings_are_those_of_jax():
  assert distributed.settings({**_FULL, 'T5X_LIKE_CLUSTER': ''}) == {
    'coordinator_address': '10.0.0.1:8476', 'num_processes': 4, 'process_id': 3}
  assert distributed.settings({'T5X_LIKE_CLUSTER': 'auto'}) == {}


@pytest.mark.parametrize('change, text', [
    ({'T5X_LIKE_PROCESS_ID': ''},
     'T5X_LIKE_COORDINATOR and T5X_LIKE_PROCESSES needs T5X_LIKE_PROCESS_ID beside it'),
    ({'T5X_LIKE_PROCESS_ID': '4'}, 'T5X_LIKE_PROCESS_ID=4 must be below T5X_LIKE_PROCESSES=4'),
    ({'T5X_LIKE_PROCESSES': '-1'}, "T5X_LIKE_PROCESSES='-1' must be a whole number"),
    ({'T5X_LIKE_COORDINATOR': '10.0.0.1'}, 'must be host:port of process 0'),
    ({'T5X_LIKE_CLUSTER': 'auto'}, 'are both set; unset one'),
    ({'T5X_LIKE_CLUSTER': 'slurm'}, "T5X_LIKE_CLUSTER='slurm' is unknown; allowed: 'auto'"),
])
def test_contradictions_are_refused(change, text):
  with pytest.raises(ValueError, match='T5X_LIKE_') as error:
    distributed.settings({**_FULL, **change})
  assert text in str(error.value)


def test_no_cluster_where_one_is_asked_for_is_an_error_and_not_a_run_alone(tmp_path):
  environment = {'PATH': '/usr/bin:/bin', 'T5X_LIKE_CLUSTER': 'auto', 'JAX_PLATFORMS': 'cpu',
                 'TPU_SKIP_MDS_QUERY': '1', 'PYTHONPATH': str(_ROOT)}
  done = subprocess.run([sys.executable, '-m', 't5x_like.train', '--gin_file=none.gin'],
                        cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  assert 'error: T5X_LIKE_CLUSTER=auto, but JAX detects no cluster here' in done.stderr
