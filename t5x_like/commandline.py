"""The command line of every entry module: T5X's flags, read without importing anything slow."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from t5x_like import names

# What each flag takes; None takes no value.
_TAKES: dict[str, str | None] = {
  'gin_file': 'FILE',
  'gin_search_paths': 'DIR,DIR',
  'gin_bindings': "'NAME = VALUE'",
  'module': 'my.package',
  'dry_run': None,
  'debug': None,
  'help': None,
}

USAGE = """\
usage: python -m {module} [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [flags]

  --gin_file=FILE            a gin file; give several, later ones win. Looked for as written, in the
                             search paths, then among the files shipped with the package
  --gin.NAME=VALUE           one binding, applied after all files: a macro (--gin.TRAIN_STEPS=100),
                             a parameter (--gin.optim.adamw.b2=0.99) or a scoped one
                             (--gin.eval/loader.Loader.batch_size=4)
  --gin_bindings='N = V'     the same, written as in a file
  --gin_search_paths=A,B     folders searched for gin files and their includes
  --module=my.package        import a module of yours, so that bindings can name what is in it
  --dry_run                  build and check everything, compute nothing
  --debug                    show tracebacks of errors (or set T5X_LIKE_DEBUG=1)
  --help                     this text
{extra}
Strings in gin are quoted, so quote twice in a shell: --gin.MODEL_DIR='"/tmp/run"'
"""


class Binding(NamedTuple):
  """One setting from the command line: gin's text for it, and how the user wrote it."""

  text: str
  shown: str


class Flags(NamedTuple):
  """What a command line says."""

  files: tuple[str, ...] = ()
  bindings: tuple[Binding, ...] = ()
  search_paths: tuple[str, ...] = ()
  modules: tuple[str, ...] = ()
  extra: Mapping[str, Any] = {}
  action: Literal['run', 'dry_run', 'help'] = 'run'
  errors: Literal['short', 'traceback'] = 'short'


def usage(module: str, extra: Mapping[str, Callable[[str], Any]], doc: str | None) -> str:
  """Returns the help text of an entry module.

  Args:
    module: its importable name.
    extra: its own flags, by name, with the function that reads a value.
    doc: its docstring, shown above the flags: it holds the examples.
  """
  own = ''.join(f'  --{name}={_kind(read).upper()}\n' for name, read in extra.items())
  own = f'\nflags of {module}:\n{own}' if own else ''
  return (f'{doc.strip()}\n\n' if doc else '') + USAGE.format(module=module, extra=own)


def _kind(read: Callable[[str], Any]) -> str:
  return getattr(read, '__name__', 'value')


def parse(argv: Sequence[str], extra: Mapping[str, Callable[[str], Any]] | None = None) -> Flags:
  """Reads a command line.

  Args:
    argv: the arguments, without the program's name.
    extra: flags of this entry beyond the common ones: name to the function that reads its value.

  Raises:
    ValueError: an unknown flag, a missing or unreadable value, or a stray argument.
  """
  extra = dict(extra or {})
  files, bindings, paths, modules = [], [], [], []
  own: dict[str, Any] = {}
  action: Literal['run', 'dry_run', 'help'] = 'run'
  errors: Literal['short', 'traceback'] = (
    'traceback' if os.environ.get('T5X_LIKE_DEBUG', '') not in ('', '0') else 'short'
  )
  todo = list(argv)
  while todo:
    arg = todo.pop(0)
    if arg == '-h':
      arg = '--help'
    if not arg.startswith('-'):
      fix = f'--gin_file={arg}' if arg.endswith('.gin') else f'--gin.{arg}'
      raise ValueError(
        f"'{arg}' is not a flag"
        + (f'; write {fix}' if arg.endswith('.gin') or '=' in arg else '; --help lists the flags')
      )
    name, equals, value = arg.lstrip('-').partition('=')
    if name.startswith('gin.'):
      bindings.append(_binding(arg, name[len('gin.') :], equals, value))
      continue
    name = name.replace('-', '_')
    if name not in _TAKES and name not in extra:
      raise ValueError(f'there is no flag --{name}{_suggest_flag(name, extra)}')
    if name in extra or _TAKES[name] is not None:
      if not equals:
        if not todo:
          raise ValueError(f'--{name} needs a value: --{name}={_TAKES.get(name, "VALUE")}')
        value = todo.pop(0)
    elif equals and value.lower() not in ('true', '1', 'false', '0'):
      raise ValueError(f"--{name} takes no value, but got '{value}'")
    elif equals and value.lower() in ('false', '0'):
      continue
    if name in extra:
      own[name] = _read(name, value, extra[name])
    elif name == 'gin_file':
      files.append(value)
    elif name == 'gin_bindings':
      bindings.append(Binding(value, f'--gin_bindings={shlex.quote(value)}'))
    elif name == 'gin_search_paths':
      paths.extend(p for p in value.split(',') if p)
    elif name == 'module':
      modules.extend(m for m in value.split(',') if m)
    elif name == 'debug':
      errors = 'traceback'
    elif action != 'help':
      action = 'help' if name == 'help' else 'dry_run'
  return Flags(tuple(files), tuple(bindings), tuple(paths), tuple(modules), own, action, errors)


def _binding(arg: str, name: str, equals: str, value: str) -> Binding:
  if not equals or not name:
    raise ValueError(f"'{arg}' has no value; write --gin.{name or 'NAME'}=VALUE")
  if not value.strip():
    raise ValueError(f"'{arg}' has an empty value; for an empty text write --gin.{name}='\"\"'")
  return Binding(f'{name} = {value}', arg)


def _suggest_flag(name: str, extra: Mapping[str, Any]) -> str:
  close = names.nearest(name, [*_TAKES, *extra], count=1)
  if close:
    return f'; did you mean --{close[0]}?'
  return f'; a setting is written --gin.{name}=VALUE, and --help lists the flags'


def _read(name: str, value: str, read: Callable[[str], Any]) -> Any:
  try:
    return read(value)
  except ValueError:
    raise ValueError(f"--{name} takes {_kind(read)}, but got '{value}'") from None
