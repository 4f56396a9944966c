"""Programs that stand for those of a cluster: first on PATH, they record how they were called."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# Words that a shell, gin or YAML could take apart.
ODD = ['--gin.MODEL_DIR="gs://b/x y"', "it's", 'a$b `c` \\n \\', '', '*', '- a: {b}', '#c', 'é"\'']

_RECORD = f'#!{sys.executable}\n' + """\
import json, os, sys
with open(os.environ['CALLS'], 'a') as file:
  stdin = '' if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
  file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + '\\n')
  if stdin:
    open(os.environ['CALLS'] + '.stdin', 'w').write(stdin)
"""


class Cluster:
  """A PATH with fakes in front, and what they were called with."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.bin, self.calls_file = folder, folder / 'bin', folder / 'calls'
    self.bin.mkdir()
    self.environment = {**os.environ, 'PATH': f'{self.bin}:/usr/bin:/bin',
                        'CALLS': str(self.calls_file)}
    for program in ('gcloud', 'kubectl', 'xpk', 'sbatch', 'scontrol', 'srun'):
      self.add(program, 'sys.exit(97)')  # Never the real one, wherever that is installed.

  def add(self, program: str, source: str = '') -> None:
    """Adds a program that records its arguments, then runs the source (Python)."""
    (self.bin / program).write_text(_RECORD + source)
    (self.bin / program).chmod(0o755)

  def calls(self) -> list[list[str]]:
    """Returns the words of every call, the program's name first."""
    if not self.calls_file.exists():
      return []
    return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

  def run(self, script: str, *words: str) -> subprocess.CompletedProcess:
    """Runs one of the scripts; nothing to read from."""
    return subprocess.run([str(ROOT / 'scripts' / script), *words], env=self.environment,
                          capture_output=True, text=True, timeout=120, cwd=self.folder,
                          stdin=subprocess.DEVNULL)


def words(line: str) -> list[str]:
  """The words a shell makes of a line that a dry run printed."""
  code = 'import json, sys; print(json.dumps(sys.argv[1:]))'
  done = subprocess.run(['bash', '-c', f'"$0" -c \'{code}\' {line}', sys.executable],
                        capture_output=True, text=True, check=True)
  return json.loads(done.stdout)
