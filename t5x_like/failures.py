"""How an error reaches the terminal: a clear message for what a user did, tracebacks for bugs."""

import importlib
import os
import pkgutil
import re
import shlex
import sys
import traceback
from collections.abc import Iterable

from t5x_like import names


class Located(ValueError):
  """A user's error whose text already says where."""


def report(error: Exception, *, show: str, ours: frozenset[str]) -> int:
  """Prints an error to stderr and returns the exit status: 2 for a user's error, 1 for a bug.

  A user's error is a ValueError, OSError or FloatingPointError (training diverged) raised by our
  packages, the user's own modules or the standard library. The same exception out of JAX or Flax is
  a bug until shown otherwise.

  Args:
    error: what was raised.
    show: 'short' or 'traceback'.
    ours: top-level names of installed packages whose errors speak to the user.
  """
  theirs = (ValueError, OSError, FloatingPointError)
  users = isinstance(error, theirs) and _speaks_to_user(error, ours)
  if show == 'traceback' or not users:
    traceback.print_exception(error)
  if users:
    print(f'error: {plain(error)}', file=sys.stderr)
  return 2 if users else 1


def _speaks_to_user(error: BaseException, ours: frozenset[str]) -> bool:
  """Says whether the code that raised is ours, the user's or Python's, not another library's."""
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  modules = [
    (frame.f_globals.get('__name__', '').partition('.')[0], frame.f_code.co_filename)
    for frame in frames
  ]
  modules = [m for m in modules if m[0] != 'gin']  # Gin re-raises what it calls.
  package, file = modules[-1] if modules else ('', '')
  installed = 'site-packages' in file or 'dist-packages' in file
  return not installed or package in ours or package in sys.stdlib_module_names


def syntax(error: SyntaxError, origin: str) -> str:
  """Says what cannot be read, and how a text is quoted, which is the usual reason."""
  text = (error.text or '').strip()
  message = plain(error).split('\n')[0]
  if re.match(r'(malformed node|Unable to parse|invalid syntax|name )', message):
    message = 'the value cannot be read'
  if origin == 'command line':
    name, _, value = text.partition(' = ')
    quoted = shlex.quote(f'--gin.{name}="{value}"')
    return f'{message}; is it a text? Then it needs quotes: {quoted}'
  return f'{message}\n    {text}\n  (a text needs quotes, a reference @, a macro %)'


def plain(error: BaseException) -> str:
  """Returns an exception's own text, without what gin adds to it on the way up."""
  text = str(error.args[0]) if isinstance(error, SyntaxError) and error.args else str(error)
  return re.split(
    r'\n +(?:In call to configurable|In file "|In bindings string|No values supplied)', text
  )[0].strip()


def no_module(module: str, error: ModuleNotFoundError, *, ours: Iterable[str]) -> str:
  """Says which part of an import does not exist, and the nearest name that does."""
  missing = error.name or ''
  if not (module == missing or module.startswith(missing + '.')):
    return f"importing {module} failed: {error}; is the package '{missing}' installed?"
  parent, _, leaf = missing.rpartition('.')
  if not parent:
    known = {m.name for m in pkgutil.iter_modules([os.getcwd()])} | {*ours}
    return f"there is no module '{missing}'{names.suggest(missing, known)}"
  package = importlib.import_module(parent)
  if hasattr(package, leaf):
    return f"'{leaf}' is not a module; import {parent} and write {parent.split('.')[-1]}.{leaf}"
  known = {m.name for m in pkgutil.iter_modules(getattr(package, '__path__', []))}
  return f"{parent} has no module '{leaf}'{names.suggest(leaf, known)}"
