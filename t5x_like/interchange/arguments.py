"""The command line of `t5x_like.convert`: a command and folders, before the usual flags."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like import names

Flags = Mapping[str, Callable[[str], Any]]

IMPORT: Flags = {'hf_dir': str, 'out': str, 'dtype': str, 'unknown': str}
EXPORT: Flags = {'checkpoint': str, 'out': str, 'dtype': str, 'shard_size': str, 'spelling': str,
                 'family': str, 'step': int, 'which': str}
VERIFY: Flags = {'hf_dir': str, 'checkpoint': str, 'step': int}
# What the folders after a command are.
_FOLDERS = {'import': ('hf_dir',), 'export': ('checkpoint',), 'verify': ('hf_dir', 'checkpoint')}


def split(argv: Sequence[str]) -> tuple[str, list[str]]:
  """Turns a command and its folders into flags.

  Args:
    argv: the command line without the program's name.
  Returns:
    The command, 'import' where only --help is asked for, and the rest as flags.
  Raises:
    SystemExit: with status 2, after a message, where the command or a folder is missing.
  """
  if not argv or argv[0].startswith('-'):
    if {'--help', '-h'} & set(argv):
      return 'import', ['--help']
    _refuse(f'a command is needed: {", ".join(_FOLDERS)}; --help shows each')
  command, rest = argv[0], list(argv[1:])
  if command not in _FOLDERS:
    _refuse(f'{command!r} is no command{names.suggest(command, _FOLDERS)} '
            f'Commands: {", ".join(_FOLDERS)}')
  flags = []
  for name in _FOLDERS[command]:
    given = any(arg.partition('=')[0] == f'--{name}' for arg in rest)
    if given or {'--help', '-h'} & set(rest):
      continue
    if not rest or rest[0].startswith('-'):
      _refuse(f'{command} needs {" and ".join(n.upper() for n in _FOLDERS[command])} after it')
    flags.append(f'--{name}={rest.pop(0)}')
  needs_out = command != 'verify' and not {'--help', '-h'} & set(rest)
  if needs_out and not any(arg.partition('=')[0] == '--out' for arg in rest):
    _refuse(f'{command} needs --out=DIR, a folder that does not exist yet')
  return command, [*flags, *rest]


def _refuse(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  raise SystemExit(2)
