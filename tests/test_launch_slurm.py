"""What Slurm gets: the batch script, its words, and what it does at the time limit."""

import pathlib
import subprocess

import fakes
import pytest

_SIZE = ['--nodes', '2', '--gpus_per_node', '8']


@pytest.fixture
def slurm(tmp_path):
  made = fakes.Cluster(tmp_path)
  made.add('sbatch', "print('Submitted batch job 7')")
  made.add('scontrol')
  made.add('srun', "sys.exit(int(os.environ.get('ENDS', '0')))")
  return made


def _settings(script: str) -> list[str]:
  return [line.removeprefix('#SBATCH ') for line in script.splitlines() if '#SBATCH' in line]


def test_a_job_has_one_process_per_gpu_and_saves_before_its_time_is_up(slurm):
  flags = ['--time', '4:00:00', '--partition', 'gpu', '--account', 'lab', '--cpus_per_gpu', '12',
           '--sbatch_flag=--exclusive', '--sbatch_flag', '--mail-user=a@b.c', '--logs', 'my logs']
  done = slurm.run('launch_slurm', 'run-1', *_SIZE, *flags, '--', 'python', *fakes.ODD)
  assert done.returncode == 0, done.stderr
  logs = slurm.folder / 'my logs'
  assert slurm.calls() == [['sbatch', f'{logs}/run-1.sbatch']]
  script = (logs / 'run-1.sbatch').read_text()
  assert _settings(script) == [
    '--job-name=run-1', '--nodes=2', '--gpus-per-node=8', '--ntasks-per-node=8', '--requeue',
    '--dependency=singleton', '--signal=TERM@120', '--open-mode=append',
    f'--output="{logs}/%j.log"',
    '--time=4:00:00', '--partition=gpu', '--account=lab', '--cpus-per-task=12', '--exclusive',
    '--mail-user=a@b.c']
  # Slurm reads them up to the first command only.
  assert script.index('set -uo') > script.rindex('#SBATCH')


def test_a_dry_run_prints_the_script_that_would_be_submitted(slurm):
  words = ['launch_slurm', 'a', *_SIZE, '--logs', 'logs', '--', 'python', *fakes.ODD]
  assert slurm.run(*words).returncode == 0
  submitted = (slurm.folder / 'logs/a.sbatch').read_text()
  slurm.calls_file.unlink()
  done = slurm.run(words[0], 'a', '--dry_run', *words[2:])
  assert done.returncode == 0 and not slurm.calls()
  assert done.stdout == submitted + f'\n# submitted with: sbatch {slurm.folder}/logs/a.sbatch\n'


def _batch(slurm, ends: int, restarts: int = 0) -> tuple[int, list[list[str]]]:
  """Runs the script as Slurm would; returns its status and what it called."""
  assert slurm.run('launch_slurm', 'a', *_SIZE, '--restarts', '3', '--logs', 'logs', '--',
                   'python', *fakes.ODD).returncode == 0
  slurm.calls_file.unlink()
  environment = {**slurm.environment, 'SLURM_JOB_ID': '7', 'ENDS': str(ends),
                 'SLURM_RESTART_COUNT': str(restarts)}
  done = subprocess.run(['bash', pathlib.Path(slurm.folder, 'logs/a.sbatch')], env=environment,
                        capture_output=True, text=True)
  return done.returncode, slurm.calls()


def test_the_command_reaches_every_process_as_it_was_given(slurm):
  status, calls = _batch(slurm, 0)
  assert status == 0
  assert calls == [['srun', '--kill-on-bad-exit=1', '--gpu-bind=none', '--label', 'python',
                    *fakes.ODD]]


@pytest.mark.parametrize('ends, restarts, again', [(143, 0, True), (143, 2, True), (143, 3, False),
                                                   (2, 0, False), (1, 0, False)])
def test_only_a_run_whose_time_is_up_is_requeued_and_not_for_ever(slurm, ends, restarts, again):
  status, calls = _batch(slurm, ends, restarts)
  assert status == ends
  assert calls[1:] == ([['scontrol', 'requeue', '7']] if again else [])


def test_a_job_that_slurm_ends_itself_is_not_requeued_a_second_time(slurm):
  # Its SIGTERM reaches the batch shell too: at scancel, the user wants no further stretch.
  slurm.add('srun', 'import signal; os.kill(os.getppid(), signal.SIGTERM); sys.exit(143)')
  status, calls = _batch(slurm, 143)
  assert status == 143 and [call[0] for call in calls] == ['srun']


@pytest.mark.parametrize('words, text', [
    ([], 'the first word is the name of the job'),
    (['--nodes', '2'], 'the first word is the name of the job'),
    (['Run'], "the name 'Run' must be 1 to 40 lower-case letters"),
    (['a', '--gpus_per_node', '8', '--', 'x'], 'how many nodes? add --nodes N'),
    (['a', '--nodes', '8', '--', 'x'], 'how many GPUs has a node? add --gpus_per_node G'),
    (['a', *_SIZE], 'no command; write it after --'),
    (['a', '--nodes', '0'], "--nodes takes a whole number from 1, but got '0'"),
    (['a', '--partition', 'a b'], "--partition takes one word, but got 'a b'"),
    (['a', '--gpus', '8'], "unknown option '--gpus'; see scripts/launch_slurm --help"),
    (['a', *_SIZE, '--sbatch_flag=--x\nrm', '--', 'x'], 'a line break in --sbatch_flag'),
])
def test_refusals(slurm, words, text):
  done = slurm.run('launch_slurm', *words)
  assert done.returncode == 2 and done.stderr.startswith(f'error: {text}'), done.stderr
  assert not slurm.calls()


def test_a_missing_sbatch_is_named_with_what_to_do(slurm):
  (slurm.bin / 'sbatch').unlink()
  done = slurm.run('launch_slurm', 'a', *_SIZE, '--', 'x')
  assert done.returncode == 2
  assert 'error: sbatch is not installed or not on PATH; run this on a login node' in done.stderr
