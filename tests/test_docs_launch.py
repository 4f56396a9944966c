"""The commands of docs/launch.md, each as far as a dry run takes it."""

import re

import fakes
import pytest

_TEXT = (fakes.ROOT / 'docs/launch.md').read_text()
_LINES = [line for block in re.findall(r'```bash\n(.*?)```', _TEXT, re.S)
          for line in block.splitlines()]


@pytest.mark.parametrize('line', _LINES, ids=lambda line: ' '.join(line.split()[:2]))
def test_command_of_the_documentation(tmp_path, line):
  cluster = fakes.Cluster(tmp_path)
  script, *words = fakes.words(line)
  end = words.index('--') if '--' in words else len(words)
  done = cluster.run(script.removeprefix('./scripts/'), *words[:end], '--dry_run', *words[end:])
  assert done.returncode == 0 and not done.stderr and not cluster.calls(), done.stderr
  # What comes after -- is there, quotes of gin included.
  for word in words[end + 1:]:
    assert word.replace('"', r'\"') in done.stdout or word in done.stdout


def test_every_launcher_is_shown():
  shown = {fakes.words(line)[0] for line in _LINES}
  assert shown == {f'./{file.relative_to(fakes.ROOT)}'
                   for file in (fakes.ROOT / 'scripts').glob('launch_*')}


def test_the_variables_are_those_that_are_read():
  source = (fakes.ROOT / 't5x_like/distributed.py').read_text()
  for name in set(re.findall(r'T5X_LIKE_[A-Z_]+', _TEXT)):
    assert f"'{name.removeprefix('T5X_LIKE_')}'" in source
