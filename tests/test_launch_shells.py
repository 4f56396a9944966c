"""Every shell script of the repository, and one that a launcher writes, held against shellcheck."""

import pathlib
import shutil
import subprocess
import sys

import fakes
import pytest

_SCRIPTS = sorted(
  str(file.relative_to(fakes.ROOT)) for folder in ('scripts', '.ci')
  for file in (fakes.ROOT / folder).iterdir()
  if file.is_file() and (file.suffix == '.bash' or file.read_bytes()[:40].startswith(b'#!/'))
  and b'bash' in file.read_bytes()[:40] + file.suffix.encode())


def _check(*words: str, text: str | None = None) -> str:
  program = shutil.which('shellcheck') or shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent))
  if program is None:
    pytest.skip('shellcheck is not installed: scripts/setup dev, or apt install shellcheck')
  done = subprocess.run([program, '--external-sources', '--source-path=.', '--severity=warning',
                         '--shell=bash', *words], cwd=fakes.ROOT, capture_output=True, text=True,
                        input=text)
  return done.stdout + done.stderr


def test_the_launchers_are_among_them():
  assert {'scripts/launch_local', 'scripts/launch_tpu_pod', 'scripts/launch_gke',
          'scripts/launch_slurm', 'scripts/launching.bash', '.ci/run'} <= set(_SCRIPTS)


def test_shellcheck_finds_nothing():
  assert _check(*_SCRIPTS) == ''


def test_shellcheck_would_find_something():
  assert 'SC2068' in _check('-', text='for i in $@; do echo "$i"; done\n')


def test_what_slurm_gets_is_clean_too(tmp_path):
  cluster = fakes.Cluster(tmp_path)
  done = cluster.run('launch_slurm', 'a', '--nodes', '2', '--gpus_per_node', '8', '--dry_run', '--',
                     'python', *fakes.ODD)
  assert done.returncode == 0 and _check('-', text=done.stdout) == ''


@pytest.mark.parametrize('script', [s for s in _SCRIPTS if s.startswith('scripts/launch_')])
def test_help_is_the_head_of_the_script(script):
  done = subprocess.run([fakes.ROOT / script, '--help'], capture_output=True, text=True)
  assert done.returncode == 0 and f'{script} ' in done.stdout.splitlines()[0]
  assert '--dry_run' in done.stdout and 'set -euo' not in done.stdout
  # Each option that it reads is explained.
  source = (fakes.ROOT / script).read_text()
  options = {word for line in source.splitlines() if line.startswith('    --') and ')' in line
             for word in line.split(')')[0].strip().split('|') if word.startswith('--')}
  missing = {o for o in options - {'--', '--help'} if not o.endswith('=*') and o not in done.stdout}
  assert options and not missing
