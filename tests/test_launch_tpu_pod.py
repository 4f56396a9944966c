"""A TPU pod from its request to its end, against a gcloud that records and two workers that run."""

import contextlib
import json
import pathlib
import subprocess
import sys

import fakes
import pytest

_MINOR = f'{sys.version_info[0]}.{sys.version_info[1]}'
_ZONE = ['--zone', 'us-east5-b']
_TPU = [*_ZONE, '--accelerator_type', 'v6e-16']

# The resource is a file with its state, each worker a folder; --command runs there in a shell.
_GCLOUD = """
import pathlib, shutil, subprocess, time
cloud = pathlib.Path(os.environ['CLOUD'])
state, argv = cloud / 'state', [a for a in sys.argv[1:] if a != 'alpha']
verb, rest = argv[3], argv[4:]
workers = sorted(cloud.glob('worker*'))
option = lambda name: next((a.split('=', 1)[1] for a in rest if a.startswith(name + '=')), None)
if verb == 'describe':
  if not state.exists():
    sys.exit('ERROR: (gcloud) NOT_FOUND: Resource was not found')
  now = state.read_text()
  if now == 'BROKEN':
    sys.exit('ERROR: (gcloud) You do not currently have an active account selected.')
  print(now)
  after = {'WAITING_FOR_RESOURCES': 'PROVISIONING', 'PROVISIONING': 'ACTIVE',
           'SUSPENDING': 'SUSPENDED'}
  state.write_text(after.get(now, now))
elif verb == 'create':
  state.write_text(os.environ.get('AFTER_CREATE', 'WAITING_FOR_RESOURCES'))
elif verb == 'delete':
  state.unlink()
elif state.read_text() != 'ACTIVE':
  sys.exit('ERROR: no such node')
elif verb == 'scp':
  if os.environ.get('LOST') and not (cloud / 'lost').exists():
    (cloud / 'lost').touch()
    state.write_text('SUSPENDED')
    sys.exit('ERROR: connection closed')
  for worker in workers:
    shutil.copy(rest[0], worker)
elif verb == 'ssh':
  for worker in workers:
    done = subprocess.run(['bash', '-c', option('--command')], cwd=worker, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, 'HOME': str(worker)})
    if option('--output-directory'):
      pathlib.Path(option('--output-directory'), worker.name + '.log').write_text(done.stdout)
    else:
      print(done.stdout, end='')
    if done.returncode:
      sys.exit(done.returncode)
"""


@pytest.fixture
def pod(tmp_path):
  """A cloud with two workers whose environment is finished, and nothing asked for yet."""
  made = fakes.Cluster(tmp_path)
  made.add('gcloud', _GCLOUD)
  made.add('sudo', 'sys.exit(97)')  # No worker may change this machine.
  (made.bin / 'python3').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  (made.bin / 'python3').chmod(0o755)
  lock = (fakes.ROOT / f'requirements/lock-{_MINOR}.txt').read_bytes()
  stamp = subprocess.run(['cksum'], input=lock, capture_output=True, check=True).stdout
  for number in range(2):
    venv = tmp_path / f'worker{number}/a/.venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / f'lib/python{_MINOR}/site-packages').mkdir(parents=True)
    # Stands for the Python of the worker; what it would install is recorded.
    (venv / 'bin/python').write_text(
      '#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >>pip; exit; fi\n'
      f'exec "{sys.executable}" "$@"\n')
    (venv / 'bin/python').chmod(0o755)
    (venv / '.stamp-run').write_bytes(stamp)
  made.environment |= {'CLOUD': str(tmp_path)}
  return made


def _workers(pod) -> list[pathlib.Path]:
  return sorted(pod.folder.glob('worker*/a'))


@contextlib.contextmanager
def _everywhere(pod, script: str):
  """A command under way on every worker."""
  with contextlib.ExitStack() as held:
    for worker in _workers(pod):
      process = held.enter_context(subprocess.Popen(['bash', '-c', script], cwd=worker))
      (worker / 'run.pid').write_text(str(process.pid))
    yield


def _verbs(pod) -> list[str]:
  """What gcloud was asked for, looking and following left out."""
  found = []
  for call in pod.calls():
    words = [word for word in call if word != 'alpha']
    assert words[1:4] == ['compute', 'tpus', 'queued-resources'] and '--zone=us-east5-b' in words
    if words[4] != 'describe' and not any('worker=' in w and w.startswith('--com') for w in words):
      found.append(words[4])
  return found


# Writes what it was called with, and where; is taken away with all workers the first time.
_TRAIN = """
import json, os, pathlib, sys, time
attempts = pathlib.Path('..', 'attempts')
attempts.write_text((attempts.read_text() if attempts.exists() else '') + 'x')
pathlib.Path('words').write_text(json.dumps(sys.argv[1:]))
print('cluster', os.environ['T5X_LIKE_CLUSTER'], 'python', os.environ['PATH'].split(':')[0])
cloud = pathlib.Path(os.environ['CLOUD'])
if len(attempts.read_text()) == 1 and os.environ.get('PREEMPT'):
  if os.path.abspath('.').endswith('worker1/a'):
    (cloud / 'state').write_text('SUSPENDING')
  time.sleep(3)
  sys.exit(143)
"""


def _run(pod, *flags: str, train: str = _TRAIN):
  (pod.folder / 'train.py').write_text(train)
  return pod.run('launch_tpu_pod', 'run', 'a', *_TPU, '--poll', '1', '--logs',
                 str(pod.folder / 'logs'), *flags, '--', 'python', str(pod.folder / 'train.py'),
                 *fakes.ODD)


def test_a_run_is_created_set_up_started_everywhere_followed_and_gathered(pod):
  done = _run(pod, '--spot', '--prepare', "echo 'a  b' >prepared")
  assert done.returncode == 0, done.stderr
  assert _verbs(pod) == ['create', 'scp', 'ssh', 'ssh', 'ssh']
  create = next(call for call in pod.calls() if 'create' in call)
  assert create[4:] == ['create', 'a', '--node-id=a', '--accelerator-type=v6e-16',
                        '--runtime-version=v2-alpha-tpuv6e', '--spot', '--zone=us-east5-b']
  for now in ('is WAITING_FOR_RESOURCES', 'is PROVISIONING', 'is ACTIVE', 'copying revision'):
    assert now in done.stderr
  assert 'the command has ended well on all workers' in done.stderr
  assert 'costs money until: scripts/launch_tpu_pod stop a --zone us-east5-b' in done.stderr
  for number, worker in enumerate(_workers(pod)):
    assert json.loads((worker / 'words').read_text()) == fakes.ODD
    assert (worker / 't5x_like/train.py').exists(), 'the clone was not copied'
    assert 'jax[tpu]==' in (worker / 'pip').read_text()
    assert (worker.parent / 'prepared').read_text() == 'a  b\n'
    log = (pod.folder / f'logs/slice-0/worker{number}.log').read_text()
    assert log == f'cluster auto python {worker}/.venv/bin\n'


def test_after_a_preemption_the_same_command_runs_on_a_new_one(pod):
  pod.environment['PREEMPT'] = '1'
  done = _run(pod, '--when_done', 'stop')
  assert done.returncode == 0, done.stderr
  assert 'a was taken away' in done.stderr
  assert 'restart 1 of 20, with the same command' in done.stderr
  verbs = _verbs(pod)
  assert verbs[:7] == ['create', 'scp', 'ssh', 'ssh', 'delete', 'create', 'scp']
  assert verbs[-1] == 'delete' and not (pod.folder / 'state').exists()
  starts = [c for c in pod.calls() if any('setsid' in word for word in c)]
  assert len(starts) == 2 and starts[0] == starts[1]


def test_what_is_taken_away_while_it_is_set_up_is_asked_for_again(pod):
  pod.environment['LOST'] = '1'
  done = _run(pod)
  assert done.returncode == 0 and 'restart 1 of 20' in done.stderr, done.stderr
  assert _verbs(pod)[:4] == ['create', 'scp', 'delete', 'create']


def test_a_worker_whose_old_python_cannot_be_replaced_stops_the_launch(pod):
  (pod.bin / 'python3').write_text('#!/bin/sh\nexit 1\n')
  done = _run(pod, '--prepare', 'command() { false; }')
  assert done.returncode == 1 and 'error: the workers cannot be set up' in done.stderr
  assert ['sudo', 'apt-get', '-qq', 'update'] in pod.calls() and 'costs money' in done.stderr
  assert not any('setsid' in word for call in pod.calls() for word in call)


def test_restarts_are_bounded(pod):
  done = _run(pod, '--restarts', '1', train='import os; os.kill(os.getpid(), 6)')
  assert done.returncode == 2 and 'restart 1 of 1' in done.stderr
  assert 'error: given up after 1 restarts; --restarts allows more' in done.stderr
  # The nodes were there all the time.
  assert _verbs(pod).count('create') == 1 and 'delete' not in _verbs(pod)


@pytest.mark.parametrize('status', [1, 2])
def test_a_command_that_fails_by_itself_is_not_repeated(pod, status):
  done = _run(pod, train=f'print("wrong"); raise SystemExit({status})')
  assert done.returncode == 1 and 'error: the command failed; its output is in' in done.stderr
  assert (pod.folder / 'logs/slice-0/worker1.log').read_text() == 'wrong\n'
  assert sum('setsid' in word for call in pod.calls() for word in call) == 1


def test_a_running_command_is_followed_and_not_started_twice(pod):
  (pod.folder / 'state').write_text('ACTIVE')
  for worker in _workers(pod):
    (worker / 'run.log').write_text('earlier\n')
  with _everywhere(pod, 'sleep 4; echo 0 >run.status'):
    done = _run(pod)
  assert done.returncode == 0 and 'a command is running there already' in done.stderr
  assert _verbs(pod) == ['ssh']  # The logs.


def test_stop_lets_the_command_save_and_deletes_even_what_does_not_answer(pod):
  (pod.folder / 'state').write_text('ACTIVE')
  saves = "trap 'echo saved >save; echo 143 >run.status; exit' TERM; while true; do sleep 0.1; done"
  with _everywhere(pod, saves):
    done = pod.run('launch_tpu_pod', 'stop', 'a', *_ZONE)
  assert done.returncode == 0, done.stderr
  assert all((worker / 'save').exists() for worker in _workers(pod))
  assert _verbs(pod) == ['ssh', 'delete'] and not (pod.folder / 'state').exists()
  (pod.folder / 'state').write_text('SUSPENDED')
  assert pod.run('launch_tpu_pod', 'stop', 'a', *_ZONE).returncode == 0
  assert not (pod.folder / 'state').exists()


def test_status_and_logs_and_create(pod):
  shown = pod.run('launch_tpu_pod', 'status', 'a', *_ZONE)
  assert shown.stdout == 'a: NONE\n'
  made = pod.run('launch_tpu_pod', 'create', 'a', *_TPU, '--poll', '1', '--slices', '2',
                 '--best_effort', '--create_flag=--network=n')
  assert made.returncode == 0, made.stderr
  create = next(call for call in pod.calls() if 'create' in call)
  assert create[:5] == ['gcloud', 'alpha', 'compute', 'tpus', 'queued-resources']
  assert create[6:] == ['a', '--node-count=2', '--node-prefix=a', '--accelerator-type=v6e-16',
                        '--runtime-version=v2-alpha-tpuv6e', '--best-effort', '--network=n',
                        '--zone=us-east5-b']
  shown = pod.run('launch_tpu_pod', 'status', 'a', *_ZONE)
  assert shown.stdout == 'a: ACTIVE\nworkers: 2 x none\n'
  for worker in _workers(pod):
    (worker / 'run.log').write_text('line\n')
  assert pod.run('launch_tpu_pod', 'logs', 'a', *_ZONE, '--logs', 'here').returncode == 0
  assert (pod.folder / 'here/slice-0/worker0.log').read_text() == 'line\n'


def test_what_cannot_be_had_is_told_with_what_gcloud_says(pod):
  pod.environment['AFTER_CREATE'] = 'FAILED'
  done = pod.run('launch_tpu_pod', 'create', 'a', *_TPU, '--poll', '1')
  assert done.returncode == 2 and 'error: a cannot be had (FAILED, see above)' in done.stderr
  # Left from before, it is asked for anew.
  del pod.environment['AFTER_CREATE']
  assert pod.run('launch_tpu_pod', 'create', 'a', *_TPU, '--poll', '1').returncode == 0
  assert _verbs(pod) == ['create', 'delete', 'create']
  (pod.folder / 'state').write_text('BROKEN')
  done = pod.run('launch_tpu_pod', 'status', 'a', *_ZONE)
  assert done.returncode == 2 and 'You do not currently have an active account' in done.stderr
  assert 'error: gcloud cannot tell the state of a' in done.stderr


def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(pod):
  _run(pod, '--slices', '2', '--project', 'p')
  called = [call for call in pod.calls() if 'describe' not in call]
  pod.calls_file.unlink()
  done = _run(pod, '--slices', '2', '--project', 'p', '--dry_run')
  assert done.returncode == 0 and done.stderr == '' and not pod.calls()
  shown = [fakes.words(line) for line in done.stdout.splitlines()]
  assert shown.pop(2)[:2] == ['git', '-C']  # The pack that is copied.
  shown = [call for call in shown if 'describe' not in call]
  # Where the pack lies for a moment, and which commit stands for it, differ.
  loose = lambda calls: [[w for w in call if not w.endswith('a.tar.gz')] for call in calls]
  once = [call for i, call in enumerate(called) if call not in called[:i]]
  assert loose(shown) == loose(once)


@pytest.mark.parametrize('words, text', [
    ([], "first comes run, create, logs, status or stop, not ''"),
    (['delete', 'a'], "first comes run, create, logs, status or stop, not 'delete'"),
    (['run', '--zone', 'z'], 'scripts/launch_tpu_pod run needs a name'),
    (['run', 'A b', '--zone', 'z'], "the name 'A b' must be 1 to 40 lower-case letters"),
    (['run', 'a'], 'no zone; add --zone, as in --zone us-central2-b'),
    (['run', 'a', *_TPU], 'no command; write it after --'),
    (['run', 'a', *_ZONE, '--', 'x'], 'no accelerator type; add --accelerator_type'),
    (['run', 'a', *_ZONE, '--accelerator_type', 'v9-8', '--', 'x'],
     "no runtime is known for 'v9-8'; name one with --runtime_version"),
    (['run', 'a', *_TPU, '--spot', '--best_effort', '--', 'x'], '--spot and --best_effort exclude'),
    (['stop', 'a', *_ZONE, '--', 'x'], 'only run takes a command after --, not stop'),
    (['stop', 'a', '--region', 'x'], "unknown option '--region'; see scripts/launch_tpu_pod"),
    (['stop', 'a', '--zone'], '--zone needs a value'),
    (['run', 'a', *_TPU, '--slices', 'two'], "--slices takes a whole number from 1, but got 'two'"),
])
def test_refusals(pod, words, text):
  done = pod.run('launch_tpu_pod', *words)
  assert done.returncode == 2 and done.stderr.startswith(f'error: {text}'), done.stderr
  assert not pod.calls()


def test_a_missing_gcloud_is_named_with_where_to_get_it(pod):
  (pod.bin / 'gcloud').unlink()
  pod.environment['PATH'] = str(pod.bin)
  for program in ('bash', 'dirname', 'basename', 'env'):
    (pod.bin / program).symlink_to(f'/usr/bin/{program}')
  done = pod.run('launch_tpu_pod', 'stop', 'a', *_ZONE)
  assert done.returncode == 2
  assert done.stderr.startswith('error: gcloud is not installed or not on PATH; install it from')
