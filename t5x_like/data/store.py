"""The token store: flat tokens and tables of documents, written once, fingerprinted, random access.

Layout of `<store_dir>/<task>/<split>/`:
  manifest.json               written last; without it the directory is not a finished store
  shard-00000.<feature>.bin   raw little-endian uint16 or uint32 tokens, documents end to end
  documents.*.bin             one column each over all documents (offsets, bytes, hash, ...)
  names.*.bin                 string tables (files, tags) the columns point into
No part of a store is loaded to open it, so opening costs the same for one document or a billion.
"""

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.data import files as files_lib
from t5x_like.data import shards as shards_lib

MANIFEST = shards_lib.MANIFEST
ShardInfo = shards_lib.ShardInfo
write_shard = shards_lib.write_shard
read_shard = shards_lib.read_shard


def finish_store(directory: str, *, shards: Sequence[ShardInfo], features: Mapping[str, int],
                 task: Mapping[str, Any], vocabulary: Mapping[str, Any],
                 inputs: Sequence[Mapping[str, Any]] = ()) -> 'Store':
  """Writes tables and manifest as `shards.write_manifest` does, and opens the store.

  Args:
    directory: where the shards were written.
    shards: all of them, any order.
    features: as given to `write_shard`.
    task: JSON-able definition; fingerprinted.
    vocabulary: 'kind', 'fingerprint', 'vocab_size', 'pad_id', 'eos_id', 'bos_id', 'file'.
    inputs: per input file 'file', 'sha256', 'bytes'.

  Returns:
    The finished store.

  Raises:
    ValueError: shards are missing, repeated or damaged, or there is no document at all.
  """
  shards_lib.write_manifest(directory, shards=shards, features=features, task=task,
                            vocabulary=vocabulary, inputs=inputs)
  return Store(directory)


def store_path(store_dir: str, *, source: str, split: str) -> str:
  """Returns the directory of one store.

  Args:
    store_dir: folder that holds the stores.
    source: name of the task.
    split: name of the split.

  Raises:
    ValueError: there is no such store; names the nearest one.
  """
  store_dir = os.path.expanduser(store_dir)
  path = os.path.join(store_dir, source, split)
  if os.path.isdir(path):
    return path
  if not os.path.isdir(store_dir):
    raise ValueError(f'store_dir {store_dir!r} does not exist: run prepare first, or correct it')
  task_dir = os.path.join(store_dir, source)
  if os.path.isdir(task_dir):
    known, wanted, kind = _stores_in(task_dir), split, f'split of source {source!r}'
  else:
    known = sorted(n for n in os.listdir(store_dir) if _stores_in(os.path.join(store_dir, n)))
    wanted, kind = source, 'source'
  near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  raise ValueError(f'unknown {kind}: {wanted!r} in {store_dir!r}; {hint}'
                   f'known: {", ".join(known) or "none"}; or run prepare for it')


def _stores_in(folder: str) -> list[str]:
  if not os.path.isdir(folder):
    return []
  return sorted(n for n in os.listdir(folder)
                if not n.startswith('.') and os.path.exists(os.path.join(folder, n, MANIFEST)))


class Store:
  """A finished token store, read-only.

  Args:
    path: directory with manifest.json.
    files: cache of open files; give all stores of a mixture the same one to bound what is open.

  Raises:
    ValueError: missing, unfinished, damaged manifest, or a file of another size than written.
  """

  def __init__(self, path: str, *, files: files_lib.Files | None = None):
    self.path = path
    self.files = files_lib.Files() if files is None else files
    self.manifest = _read_manifest(path)
    self.fingerprint: str = self.manifest['fingerprint']
    self.num_documents: int = self.manifest['documents']
    self.text_bytes: int = self.manifest['text_bytes']
    self.features: tuple[str, ...] = tuple(self.manifest['features'])
    vocabulary = self.manifest['vocabulary']
    self.vocab_size: int = vocabulary['vocab_size']
    self.pad_id: int = vocabulary['pad_id']
    self.eos_id: int | None = vocabulary.get('eos_id')
    bos_id = vocabulary.get('bos_id')
    self.bos_id: int = self.pad_id if bos_id is None else bos_id
    self._check_sizes()

  def num_tokens(self, feature: str = 'targets') -> int:
    """Returns the number of tokens of a feature over all documents."""
    return self._feature(feature)['tokens']

  @property
  def vocabulary_path(self) -> str | None:
    """Path of the vocabulary's file inside the store, None for a vocabulary without one."""
    name = self.manifest['vocabulary'].get('file')
    return os.path.join(self.path, name) if name else None

  def tokens(self, feature: str = 'targets') -> files_lib.FlatTokens:
    """Returns all tokens of a feature as one flat array [num_tokens], read on access."""
    return self._tokens[self._name(feature)]

  def offsets(self, feature: str = 'targets') -> np.ndarray:
    """Returns uint64 [num_documents + 1]: document i is tokens [offsets[i], offsets[i + 1])."""
    return self._table(f'documents.offsets.{self._name(feature)}.bin', np.uint64)

  @property
  def byte_lengths(self) -> np.ndarray:
    """Bytes of each document's text, int64 [num_documents]."""
    return self._table('documents.bytes.bin', np.int64)

  def feature_bytes(self, feature: str = 'targets') -> np.ndarray | None:
    """Bytes of the text of one feature of each document, int64 [num_documents], if known."""
    if len(self.features) == 1 and feature in self.features:
      return self.byte_lengths
    name = f'documents.bytes.{self._name(feature)}.bin'
    if name not in self.manifest['files']:
      return None  # Written before stores of several features kept it.
    found = self._table(name, np.int64)
    return None if (found == shards_lib.UNKNOWN).any() else found

  @property
  def file_index(self) -> np.ndarray:
    """Index of each document's source file, int64 [num_documents]."""
    return self._table('documents.file.bin', np.int64)

  @property
  def hashes(self) -> np.ndarray:
    """Hash of each document, uint8 [num_documents, 16]."""
    return self.files.table(self._path('documents.hash.bin'), dtype=np.uint8, width=16)

  def document_tokens(self, index: int, feature: str = 'targets') -> np.ndarray:
    """Returns the tokens of one document, uint16 or uint32 [its length]."""
    self._check_document(index)
    start, stop = (int(x) for x in self.offsets(feature)[index:index + 2])
    found = self.tokens(feature)[start:stop]
    assert isinstance(found, np.ndarray)
    return found

  def lineage(self, index: int) -> dict[str, Any]:
    """Returns where one document came from: document, file, position, hash (hex), bytes, tags."""
    self._check_document(index)
    return {
      'document': index,
      'file': self._string('files', int(self.file_index[index])),
      'position': int(self._table('documents.position.bin', np.int64)[index]),
      'hash': self.hashes[index].tobytes().hex(),
      'bytes': int(self.byte_lengths[index]),
      'tags': json.loads(self._string('tags',
                                      int(self._table('documents.tag.bin', np.int64)[index]))),
    }

  def find(self, text: str) -> np.ndarray:
    """Returns the documents with this hash (32 hex digits) or from this file, int64 [k]."""
    if len(text) == 32 and not set(text.lower()) - set('0123456789abcdef'):
      wanted = np.frombuffer(bytes.fromhex(text), np.uint8)
      return np.flatnonzero((self.hashes == wanted).all(axis=1))
    count = len(self._table('names.files.offsets.bin', np.uint64)) - 1
    found = [i for i in range(count) if self._string('files', i) == text]
    return np.flatnonzero(np.isin(self.file_index, found))

  def verify(self) -> None:
    """Reads every file of the store and compares its sha256 with the manifest.

    Raises:
      ValueError: names the damaged file.
    """
    for name, entry in self.manifest['files'].items():
      actual = shards_lib.sha256_of(self._path(name))
      if actual != entry['sha256']:
        raise ValueError(f'{self._path(name)} is corrupted: its sha256 is {actual}, the manifest '
                         f'says {entry["sha256"]}; delete {self.path} and rerun prepare')

  @functools.cached_property
  def _tokens(self) -> dict[str, files_lib.FlatTokens]:
    shards = self.manifest['shards']
    return {
      name: files_lib.FlatTokens(
        self.files, dtype=feature['dtype'],
        paths=[self._path(shards_lib.shard_file(s['index'], name)) for s in shards],
        counts=[s['tokens'][name] for s in shards])
      for name, feature in self.manifest['features'].items()}

  def _path(self, name: str) -> str:
    return os.path.join(self.path, name)

  def _table(self, name: str, dtype: type) -> np.ndarray:
    return self.files.table(self._path(name), dtype=dtype)

  def _string(self, table: str, index: int) -> str:
    offsets = self._table(f'names.{table}.offsets.bin', np.uint64)
    blob = self._table(f'names.{table}.bin', np.uint8)
    return blob[int(offsets[index]):int(offsets[index + 1])].tobytes().decode()

  def _feature(self, name: str) -> Mapping[str, Any]:
    return self.manifest['features'][self._name(name)]

  def _name(self, name: str) -> str:
    if name not in self.features:
      raise ValueError(f'store {self.path} has no feature {name!r}; it has: '
                       f'{", ".join(self.features)}')
    return name

  def _check_document(self, index: int) -> None:
    if not 0 <= index < self.num_documents:
      raise ValueError(f'document {index} is not in {self.path}: it holds documents 0 to '
                       f'{self.num_documents - 1}')

  def _check_sizes(self) -> None:
    for name, entry in self.manifest['files'].items():
      try:
        actual = os.stat(self._path(name)).st_size
      except FileNotFoundError:
        raise ValueError(f'{self._path(name)} is missing from the store; delete {self.path} and '
                         f'rerun prepare') from None
      if actual != entry['bytes']:
        raise ValueError(f'{self._path(name)} has {actual} bytes, the manifest says '
                         f'{entry["bytes"]}: it is truncated or was changed; delete {self.path} '
                         f'and rerun prepare')


def _read_manifest(path: str) -> dict[str, Any]:
  file = os.path.join(path, MANIFEST)
  if not os.path.isdir(path):
    raise ValueError(f'no token store at {path}: run prepare first, or correct the path')
  if not os.path.exists(file):
    raise ValueError(f'{path} is not a finished store: it has no {MANIFEST}; rerun prepare, '
                     f'which keeps the shards already written')
  try:
    with open(file, encoding='utf-8') as f:
      manifest = json.load(f)
    version = manifest['version']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{file} is damaged ({error}); delete {path} and rerun prepare') from error
  if version != shards_lib.VERSION:
    raise ValueError(f'{file} is of store version {version}, this code reads '
                     f'{shards_lib.VERSION}; delete {path} and rerun prepare')
  if manifest['fingerprint'] != shards_lib.fingerprint_of(manifest):
    raise ValueError(f'{file} was changed after it was written: its fingerprint does not match '
                     f'its content; delete {path} and rerun prepare')
  return manifest


def combined_fingerprint(parts: Any) -> str:
  """Returns the sha256 (hex) of JSON-able parts in canonical form."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
