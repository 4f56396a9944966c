"""Finding gin files (as written, in search paths, beside an include, shipped) and writing one."""

import os
import pathlib
from collections.abc import Sequence

from t5x_like import names


def packaged() -> pathlib.Path:
  """Returns the folder of the gin files that come with the package, installed or in a clone."""
  here = pathlib.Path(__file__).parent
  installed = here / 'gin_files'
  return installed if installed.is_dir() else here.parent / 'gin'


def find(name: str, *, search_paths: Sequence[str] = (), beside: str | None = None) -> pathlib.Path:
  """Finds a gin file.

  Args:
    name: as the user or an include wrote it; a leading `gin/` also names the packaged folder.
    search_paths: folders looked in after the name as written.
    beside: the file whose include names it, if any.

  Raises:
    ValueError: no such file; lists the places searched and the nearest names there.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_absolute():
    places = [path]
  else:
    folders = [pathlib.Path(), *(pathlib.Path(p).expanduser() for p in search_paths)]
    if beside:
      folders.append(pathlib.Path(beside).parent)
    places = [folder / path for folder in folders]
    stripped = pathlib.Path(*path.parts[1:]) if path.parts[:1] == ('gin',) else path
    places.append(packaged() / stripped)
  for place in places:
    if place.is_file():
      return _short(place)
  folder = next((place for place in places if place.is_dir()), None)
  if folder:
    raise ValueError(f"'{name}' is a folder; a gin file is needed, such as {_some(folder)}")
  searched = ''.join(f'\n  {place.absolute()}' for place in dict.fromkeys(places))
  raise ValueError(f"there is no gin file '{name}'{_nearest(path, places)} Searched:{searched}")


def _short(path: pathlib.Path) -> pathlib.Path:
  """Returns a path relative to the current directory where it lies below it."""
  here = pathlib.Path.cwd()
  return path.relative_to(here) if path.is_relative_to(here) else path


def _some(folder: pathlib.Path) -> str:
  return ', '.join(str(f) for f in sorted(folder.glob('*.gin'))[:5]) or '(it holds none)'


def _nearest(path: pathlib.Path, places: Sequence[pathlib.Path]) -> str:
  known: dict[str, None] = {}
  for folder in dict.fromkeys(place.parent for place in places):
    if folder.is_dir():
      known.update({str(path.parent / f.name): None for f in sorted(folder.glob('*.gin'))})
  if packaged().is_dir():
    shipped = sorted(packaged().rglob('*.gin'))
    known.update({f.relative_to(packaged()).as_posix(): None for f in shipped})
  close = names.nearest(str(path), known)
  by_name = {pathlib.PurePath(k).name: k for k in known}
  close += [by_name[c] for c in names.nearest(path.name, by_name) if by_name[c] not in close]
  return f'; did you mean {" or ".join(repr(c) for c in close[:3])}?' if close else '.'


def write(workdir: str | os.PathLike[str], *, text: str, command: str) -> pathlib.Path:
  """Writes a configuration to `workdir/config.gin`, whole or not at all.

  An earlier one with other contents stays as config-1.gin, config-2.gin, ..., oldest first.

  Args:
    workdir: the run's folder; made if absent.
    text: the gin text.
    command: the command line, kept as a comment above it.
  """
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'config.gin'
  if path.exists() and path.read_text(encoding='utf-8').partition('\n')[2] != text:
    number = 1
    while (folder / f'config-{number}.gin').exists():
      number += 1
    os.link(path, folder / f'config-{number}.gin')
  temporary = folder / f'.config.gin.{os.getpid()}'
  temporary.write_text(f'# {command}\n{text}', encoding='utf-8')
  temporary.replace(path)
  return path
