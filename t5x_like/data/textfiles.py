"""Folders and files of text as documents, without TensorFlow.

A document is a whole text file, a line of a .jsonl file or a row of a .parquet file. Files come in
the order of their names below the folder, so moving the folder changes nothing.
"""

import codecs
import dataclasses
import difflib
import fnmatch
import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import pyarrow
import pyarrow.parquet

from t5x_like.data import folders, packed

EXTENSIONS = ('.txt', '.md', '.rst', '.py', '.jsonl', '.parquet')
_KINDS = {'.jsonl': 'jsonl', '.ndjson': 'jsonl', '.parquet': 'parquet', '.pq': 'parquet'}


class File(NamedTuple):
  """One input file: where it is, its name in lineage, and its size in bytes."""

  path: str
  name: str
  bytes: int


class Part(NamedTuple):
  """Part of one input file: byte range of a .jsonl file, row groups of a .parquet file, or all.

  Attributes:
    file: the file.
    start: first byte or row group.
    stop: end of the range, None for that of the file.
    first: number of lines or rows before it.
    bytes: about how much of the file it is.
  """

  file: File
  start: int = 0
  stop: int | None = None
  first: int = 0
  bytes: int = 0


class Document(NamedTuple):
  """One document: text per feature, its place in its file, its content hash."""

  texts: dict[str, str]
  position: int
  hash: bytes

  @property
  def bytes(self) -> int:
    """Bytes of all its text in UTF-8."""
    return sum(self.feature_bytes.values())

  @property
  def feature_bytes(self) -> dict[str, int]:
    """Bytes of the text of each feature in UTF-8."""
    return {name: len(text.encode()) for name, text in self.texts.items()}


class Skipped(NamedTuple):
  """What was left out of a file, and why."""

  name: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Text:
  """Where text is and how to read it.

  Attributes:
    paths: folders (read recursively, folders linked to as well, each once), files or globs; one,
      or several.
    extensions: of the files to take from folders, each also with .gz or .zst after it.
    exclude: patterns (fnmatch, on the name below the folder) of files to leave out.
    keys: for .jsonl and .parquet, the key with the text of each feature; a text file is the whole
      of the only feature.
    separator: what stands between the documents of one text file, such as '<|endoftext|>'; default
      a text file is one document. It is no part of either, and is not stored.
    errors: what to do with a file, or a line of a .jsonl, that is not UTF-8 or holds half a
      surrogate pair: 'refuse' stops and names file and place, 'skip' leaves it out and says so.
  """

  paths: str | Sequence[str]
  extensions: Sequence[str] = EXTENSIONS
  exclude: Sequence[str] = ()
  keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: {'targets': 'text'})
  separator: str | None = None
  errors: Literal['refuse', 'skip'] = 'refuse'

  def __post_init__(self):
    if self.errors not in ('refuse', 'skip'):
      raise ValueError(f"errors={self.errors!r} is unknown; allowed: 'refuse', 'skip'")
    if isinstance(self.extensions, str) or isinstance(self.exclude, str):
      raise ValueError("extensions and exclude are tuples, such as ('.txt', '.md')")
    for extension in self.extensions:
      if not extension.startswith('.'):
        raise ValueError(f"extension {extension!r} must begin with a dot: '.{extension}'")
    if self.separator == '':
      raise ValueError("separator='' separates nothing; give some text, or None")
    if not self.keys:
      raise ValueError("keys must name at least one feature, such as {'targets': 'text'}")

  def definition(self) -> dict[str, Any]:
    """Returns what decides the documents, apart from the files themselves."""
    return {'extensions': sorted(self.extensions), 'exclude': sorted(self.exclude),
            'keys': dict(self.keys), 'separator': self.separator, 'errors': self.errors}

  def files(self) -> list[File]:
    """Returns the input files in canonical order.

    Raises:
      ValueError: a path that does not exist, or no file with these extensions.
    """
    found: dict[str, File] = {}
    paths = [self.paths] if isinstance(self.paths, str) else self.paths
    for given in paths:
      root, listed = self._listed(given)
      for file in listed:
        # A name that is not UTF-8 keeps its odd bytes as \\xe9, so that lineage can hold it.
        name = os.fsencode(os.path.relpath(file, root).replace(os.sep, '/')).decode(
          errors='backslashreplace')
        if any(fnmatch.fnmatch(name, pattern) for pattern in self.exclude):
          continue
        if len(paths) > 1:
          name = f'{os.path.basename(os.path.abspath(root))}/{name}'
        if name in found and os.path.realpath(found[name].path) != os.path.realpath(file):
          raise ValueError(f'{found[name].path} and {file} would both be called {name}; give '
                           f'their common folder as one path')
        found[name] = File(file, name, os.path.getsize(file))
    if not found:
      raise ValueError(f'every file of {self.paths} is excluded by {list(self.exclude)}')
    return [found[name] for name in sorted(found)]

  def _listed(self, given: str) -> tuple[str, list[str]]:
    path = os.path.expanduser(given)
    if os.path.isfile(path):
      return os.path.dirname(path) or '.', [path]
    if os.path.isdir(path):
      listed = [p for p in folders.walk(path, exclude=self.exclude) if self._wanted(p)]
      if not listed and self.exclude and any(self._wanted(p) for p in folders.walk(path)):
        raise ValueError(f'every file of {given} is excluded by {list(self.exclude)}')
      if not listed:
        raise ValueError(f'no file in {given} ends in {", ".join(self.extensions)}: '
                         f'{folders.endings(path)}; set extensions')
      return path, listed
    listed = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
    if not listed:
      raise ValueError(folders.missing(given, path=path))
    return folders.fixed_part(path), listed

  def read(self, part: Part, *, skipped: list[Skipped]) -> Iterator[Document]:
    """Yields the documents of one file, or of a part of it.

    Args:
      part: of one of `files()`.
      skipped: what is left out is appended here: empty files and, if errors is 'skip', others.

    Raises:
      ValueError: not UTF-8, malformed, truncated, or without the key; names file and line.
    """
    file, kind = part.file, kind_of(part.file.path)
    if kind != 'text':
      rows = _jsonl(part, self.errors, skipped) if kind == 'jsonl' else _parquet(part, self.keys)
      for position, record in rows:
        where = f'{file.path}:{position + 1}' if kind == 'jsonl' else f'{file.path}, row {position}'
        texts = {f: _text(record, key, where) for f, key in self.keys.items()}
        reason = _half_pair(texts, self.keys, where)
        if reason is None:
          yield document(texts, position)
        elif self.errors == 'skip':
          skipped.append(Skipped(file.name, reason))
        else:
          raise ValueError(f"{reason}; mend or remove it, or set errors='skip'")
      return
    if len(self.keys) > 1:
      raise ValueError(f'{file.path} is one text, but the features {sorted(self.keys)} are wanted; '
                       f'give them as keys of .jsonl or .parquet files')
    with packed.open_file(file.path) as stream:
      data = stream.read()
    text = _decoded(data, file, where=f'{file.path}: byte ', errors=self.errors, skipped=skipped)
    if text is None:
      return
    if not text:
      skipped.append(Skipped(file.name, 'empty'))
    cut = text.split(self.separator) if self.separator else [text]
    for position, piece in enumerate(cut):
      if piece:
        yield document({next(iter(self.keys)): piece}, position)

  def _wanted(self, path: str) -> bool:
    return _unpacked(path).endswith(tuple(e.lower() for e in self.extensions))


def parts(file: File, *, size: float) -> list[Part]:
  """Cuts a large .jsonl or .parquet file, so that several processes can read it.

  Args:
    file: one input file; any other kind stays whole.
    size: bytes a part should have, about.

  Raises:
    ValueError: a file that cannot be read.
  """
  kind = kind_of(file.path)
  if file.bytes > size and kind == 'jsonl' and not file.path.lower().endswith(packed.ENDINGS):
    cuts = _line_cuts(file.path, int(size), (file.bytes, os.stat(file.path).st_mtime_ns))
  elif file.bytes > size and kind == 'parquet':
    cuts = _group_cuts(file.path, int(size))
  else:
    return [Part(file, bytes=file.bytes)]
  ends: list[int | None] = [*(start for start, _, _ in cuts[1:]), None]
  return [Part(file, start=start, stop=stop, first=first, bytes=count)
          for (start, first, count), stop in zip(cuts, ends, strict=True)]


@functools.lru_cache(maxsize=4096)
def _line_cuts(path: str, size: int, stamp: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
  """(first byte, lines before it, bytes) of runs of whole lines."""
  del stamp  # Part of the cache's key only.
  cuts, lines, offset, begun, line = [], 0, 0, 0, 0
  with open(path, 'rb') as file:
    while block := file.read(1 << 18):
      cut = block.rfind(b'\n') + 1
      if cut and offset + cut - begun >= size:
        cuts.append((begun, line, offset + cut - begun))
        begun, line = offset + cut, lines + block.count(b'\n')
      lines += block.count(b'\n')
      offset += len(block)
  if begun < offset or not cuts:
    cuts.append((begun, line, offset - begun))
  return tuple(cuts)


def _group_cuts(path: str, size: int) -> list[tuple[int, int, int]]:
  """(first row group, rows before it, bytes) of runs of row groups."""
  try:
    found = pyarrow.parquet.read_metadata(path)
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f'{path} is not a readable parquet file: {error}') from None
  cuts: list[tuple[int, int, int]] = []
  begun, rows, row, held = 0, 0, 0, 0
  for index in range(found.num_row_groups):
    group = found.row_group(index)
    if held and held + group.total_byte_size > size:
      cuts.append((begun, row, held))
      begun, row, held = index, rows, 0
    rows, held = rows + group.num_rows, held + group.total_byte_size
  return [*cuts, (begun, row, held)]


def document(texts: dict[str, str], position: int) -> Document:
  """Returns a document with the hash of its content, which does not depend on its place."""
  digest = hashlib.blake2b(digest_size=16)
  for name in sorted(texts):
    digest.update(json.dumps(name).encode() + texts[name].encode() + b'\0')
  return Document(texts, position, digest.digest())


def split_of(digest: bytes, validation_fraction: float, *, moved: bytes | None = None) -> str:
  """Returns the split of a document: a function of its content, so copies never part.

  Args:
    digest: its 16-byte content hash.
    validation_fraction: expected share of documents held out, in [0, 1).
    moved: the hash of the document that goes to the other split.
  """
  held_out = int.from_bytes(digest[:8], 'big') < validation_fraction * 2.0**64
  held_out ^= digest == moved
  return 'validation' if held_out else 'train'


def kind_of(path: str) -> Literal['text', 'jsonl', 'parquet']:
  """Returns how a file is read, by its extension; unknown ones are text."""
  return cast(Any, _KINDS.get(os.path.splitext(_unpacked(path))[1], 'text'))


def _unpacked(path: str) -> str:
  name = os.path.basename(path).lower()
  for ending in packed.ENDINGS:
    name = name.removesuffix(ending)
  return name


def _decoded(data: bytes, file: File, *, where: str, errors: str, skipped: list[Skipped],
             offset: int = 0) -> str | None:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    reason = f'{where}{offset + error.start} is not UTF-8 ({data[error.start]:#04x})'
    if errors == 'skip':
      skipped.append(Skipped(file.name, reason))
      return None
    raise ValueError(f"{reason}; convert the file, exclude it, or set errors='skip'") from None


def _jsonl(part: Part, errors: str, skipped: list[Skipped]) -> Iterator[tuple[int, Mapping]]:
  file, offset, count = part.file, part.start, 0
  with packed.open_file(file.path) as stream:
    if offset:
      stream.seek(offset)
    for position, line in enumerate(stream, part.first):
      if part.stop is not None and offset >= part.stop:
        break
      start, offset = offset, offset + len(line)
      if not start:
        line = line.removeprefix(codecs.BOM_UTF8)
      text = _decoded(line, file, where=f'{file.path}:{position + 1}: byte ', errors=errors,
                      skipped=skipped, offset=start)
      if text is None or not text.strip():
        continue
      try:
        record = json.loads(text)
      except ValueError as error:
        raise ValueError(f'{file.path}:{position + 1}: malformed JSON: {error}') from None
      if not isinstance(record, dict):
        raise ValueError(f'{file.path}:{position + 1}: a JSON object is needed, such as '
                         f'{{"text": "..."}}; got {type(record).__name__}')
      count += 1
      yield position, record
  if not count:
    skipped.append(Skipped(file.name, 'empty'))


def _parquet(part: Part, keys: Mapping[str, str]) -> Iterator[tuple[int, Mapping]]:
  file = part.file
  try:
    with pyarrow.parquet.ParquetFile(file.path) as table:
      known = table.schema_arrow.names
      for key in keys.values():
        if key not in known:
          raise ValueError(_no_key(key, known, file.path))
      position = part.first
      groups = list(range(table.num_row_groups))[part.start:part.stop]
      for batch in table.iter_batches(batch_size=256, row_groups=groups,
                                      columns=sorted(set(keys.values()))):
        for record in batch.to_pylist():
          yield position, record
          position += 1
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f'{file.path} is not a readable parquet file: {error}') from None


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
  if key not in record:
    raise ValueError(_no_key(key, record, where))
  value = record[key]
  if not isinstance(value, str):
    raise ValueError(f'{where}: {key!r} must be text, got {type(value).__name__}: {value!r:.60}')
  return value


def _half_pair(texts: Mapping[str, str], keys: Mapping[str, str], where: str) -> str | None:
  for feature, text in texts.items():
    try:
      text.encode()
    except UnicodeEncodeError as error:  # JSON can write one, as "\\ud800"; no encoding can.
      return (f'{where}: {keys[feature]!r} holds {text[error.start]!a}, half of a surrogate pair, '
              f'which is no text')
  return None


def _no_key(key: str, known: Any, where: str) -> str:
  close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  hint = f'did you mean {close[0]!r}? ' if close else ''
  return f'{where}: there is no key {key!r}; {hint}it has: {", ".join(map(str, known)) or "none"}'
