"""Finding files: below folders, through links, by patterns."""

import difflib
import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator, Sequence


def walk(folder: str, *, exclude: Sequence[str] = ()) -> Iterator[str]:
  """Yields the files below a folder and below folders linked to, each folder once.

  Args:
    folder: hidden files and folders in it are left out.
    exclude: patterns (fnmatch, on the name below the folder); only spare the walk what they leave
      out whole.
  """
  # A folder is not entered if a pattern that ends in * leaves out all that could be below it.
  whole = [p for p in exclude if p.endswith('*')]
  entered: set[str] = set()
  # Links come after what is there itself, so that each folder is read once, under its own name.
  pending = [folder]
  while pending:
    links: list[str] = []
    for root, folders, names in itertools.chain.from_iterable(map(os.walk, pending)):
      if os.path.realpath(root) in entered:
        folders[:] = []
        continue
      entered.add(os.path.realpath(root))
      below = os.path.relpath(root, folder).replace(os.sep, '/').removeprefix('.').lstrip('/')
      folders[:] = [
        f for f in folders if not f.startswith('.') and f != '__pycache__'
        and not any(fnmatch.fnmatch(f'{below}/{f}/'.lstrip('/'), p) for p in whole)]
      links += [path for f in folders if os.path.islink(path := os.path.join(root, f))
                and not _holds(path, root)]
      yield from (os.path.join(root, n) for n in names
                  if not n.startswith('.') and os.path.isfile(os.path.join(root, n)))
    pending = sorted(links)


def _holds(link: str, root: str) -> bool:
  """Whether a link leads to a folder it lies in itself."""
  target = os.path.realpath(link)
  return os.path.commonpath([target, os.path.realpath(root)]) == target


def fixed_part(pattern: str) -> str:
  """Returns the folder that all matches of a glob lie below."""
  parts = pattern.split(os.sep)
  magic = next(i for i, p in enumerate(parts) if glob.has_magic(p))
  return os.sep.join(parts[:magic]) or (os.sep if pattern.startswith(os.sep) else '.')


def endings(folder: str) -> str:
  """Says which endings the files of a folder have."""
  counts: dict[str, int] = {}
  for path in walk(folder):
    ending = os.path.splitext(path)[1]
    counts[ending] = counts.get(ending, 0) + 1
  common = sorted(counts, key=lambda e: -counts[e])[:5]
  return 'it has ' + (', '.join(f"{counts[e]} of '{e}'" for e in common) or 'no files at all')


def missing(given: str, *, path: str) -> str:
  """Says that a path leads nowhere, and what is near it.

  Args:
    given: as the user wrote it.
    path: with ~ expanded.
  """
  if glob.has_magic(path):
    return f'no file matches {given}'
  folder, name = os.path.split(os.path.abspath(path))
  names = os.listdir(folder) if os.path.isdir(folder) else []
  close = difflib.get_close_matches(name, names, n=1)
  hint = f'; did you mean {os.path.join(folder, close[0])}?' if close else ''
  return f'there is no file or folder {given}{hint}'
