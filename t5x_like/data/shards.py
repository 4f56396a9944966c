"""Writing token stores: shards by parallel workers, then the tables and the manifest.

Every file is written under a temporary name, synced, then renamed; a shard counts once its .json is
there and the store once its manifest.json is. A kill at any moment leaves nothing half-written
under a final name.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

VERSION = 1
MANIFEST = 'manifest.json'
UNKNOWN = -1  # Bytes of a feature whose writer did not say.
_COLUMNS = {'bytes': np.int64, 'position': np.int64, 'file': np.int64, 'tag': np.int64}


@dataclasses.dataclass(frozen=True)
class ShardInfo:
  """What one written shard holds.

  Attributes:
    index: place of the shard in canonical order.
    documents: number of documents.
    tokens: tokens per feature.
    text_bytes: bytes of text of all documents.
    empty: documents left out because they had no token in any feature.
    sha256: per file written, and 'names' for the files and tags of its documents.
    key: what the shard was made from, as given to `write_shard`.
  """

  index: int
  documents: int
  tokens: dict[str, int]
  text_bytes: int
  empty: int
  sha256: dict[str, str]
  key: str


class _HashedFile:
  def __init__(self, file: BinaryIO):
    self._file = file
    self.hash = hashlib.sha256()
    self.bytes = 0

  def write(self, data: bytes) -> None:
    self._file.write(data)
    self.hash.update(data)
    self.bytes += len(data)


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[_HashedFile]:
  """Opens a file that appears at path, whole and synced, when the block ends without an error."""
  directory, name = os.path.split(path)
  fd, temporary = tempfile.mkstemp(prefix=f'.{name}.', suffix='.tmp', dir=directory)
  try:
    with os.fdopen(fd, 'wb') as file:
      yield _HashedFile(file)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def write_shard(directory: str, *, index: int, documents: Iterable[Mapping[str, Any]],
                features: Mapping[str, int], key: str = '') -> ShardInfo:
  """Writes one shard of a store, or returns the one already there.

  Safe to call from several processes at once for different indexes. Documents keep the order they
  come in. Nothing is taken from `documents` when a verified shard with the same key exists.

  Args:
    directory: `<store_dir>/<task>/<split>`; made if missing.
    index: place of this shard in the store's canonical order, from 0 without gaps.
    documents: mappings with
      'features': {name: 1-D integer array}, one entry per name in `features`;
      'text_bytes': int, bytes (UTF-8) of the text the document was made from;
      'feature_bytes': optional {name: int}, how many of them are each feature's; kept where there
        are several features, since with one they are 'text_bytes';
      'file': str, source file, relative to the task's root so that moving the data changes nothing;
      'position': int, place of the document in that file;
      'hash': 16 bytes, content hash of the text;
      'tags': optional dict (JSON-able), for example {'licence': 'MIT'}.
    features: vocabulary size of each feature to store; below 65537 tokens take two bytes, else 4.
    key: a shard written under another key is written anew; put here whatever it is made from
      (task definition, vocabulary, input files).

  Returns:
    The ShardInfo to hand to `write_manifest`.

  Raises:
    ValueError: a token outside the vocabulary, a missing or extra feature, or a finished store.
  """
  os.makedirs(directory, exist_ok=True)
  if os.path.exists(os.path.join(directory, MANIFEST)):
    raise ValueError(f'{directory} is a finished store and is never changed: use it, or delete it '
                     f'first')
  existing = read_shard(directory, index=index, key=key)
  if existing is not None:
    return existing
  with contextlib.suppress(FileNotFoundError):
    os.unlink(os.path.join(directory, _info_file(index)))
  with contextlib.ExitStack() as stack:
    out = {name: stack.enter_context(atomic_file(os.path.join(directory, shard_file(index, name))))
           for name in features}
    table, names, empty = _write_documents(documents, features=features, out=out)
    rows = stack.enter_context(atomic_file(os.path.join(directory, _table_file(index))))
    rows.write(table.tobytes())
  hashes = {shard_file(index, name): file.hash.hexdigest() for name, file in out.items()}
  hashes[_table_file(index)] = rows.hash.hexdigest()
  hashes['names'] = hashlib.sha256(_canonical(names)).hexdigest()
  info = ShardInfo(
    index=index, documents=len(table), empty=empty, key=key, sha256=hashes,
    tokens={name: file.bytes // dtype_of(features[name]).itemsize for name, file in out.items()},
    text_bytes=int(table['bytes'].sum()))
  with atomic_file(os.path.join(directory, _info_file(index))) as file:
    file.write(_canonical({**dataclasses.asdict(info), 'names': names}))
  return info


def read_shard(directory: str, *, index: int, key: str = '') -> ShardInfo | None:
  """Returns a shard already written under this key and undamaged (sha256 checked), else None."""
  try:
    info, names = _load_info(directory, index)
    if info.key != key or hashlib.sha256(_canonical(names)).hexdigest() != info.sha256['names']:
      return None
    for name, expected in info.sha256.items():
      if name != 'names' and sha256_of(os.path.join(directory, name)) != expected:
        return None
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return info


def write_manifest(directory: str, *, shards: Sequence[ShardInfo], features: Mapping[str, int],
                   task: Mapping[str, Any], vocabulary: Mapping[str, Any],
                   inputs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
  """Writes the tables over all documents, then manifest.json; open the result with `Store`.

  Args:
    directory: where the shards were written.
    shards: all of them, any order.
    features: as given to `write_shard`.
    task: JSON-able definition: 'name', 'split', and whatever decides the tokens. Fingerprinted.
    vocabulary: 'kind', 'fingerprint', 'vocab_size', 'pad_id', 'eos_id', 'bos_id', and 'file', the
      name of its file when one was copied into `directory`. Fingerprinted, 'file' excepted.
    inputs: per input file 'file', 'sha256', 'bytes'. Recorded, not fingerprinted.

  Returns:
    The manifest.

  Raises:
    ValueError: shards are missing, repeated or damaged, or there is no document at all.
  """
  shards = sorted(shards, key=lambda s: s.index)
  if [s.index for s in shards] != list(range(len(shards))):
    raise ValueError(f'shards must be 0 to n - 1, each once; got {[s.index for s in shards]}')
  documents = sum(s.documents for s in shards)
  if documents == 0:
    raise ValueError(f'no document in any of {len(shards)} shards of {directory}: check that the '
                     f'inputs are not empty')
  written = _write_tables(directory, shards, features)
  for shard in shards:
    for name in features:
      path = os.path.join(directory, shard_file(shard.index, name))
      written[shard_file(shard.index, name)] = {
        'bytes': os.path.getsize(path), 'sha256': shard.sha256[os.path.basename(path)]}
  if vocabulary.get('file'):
    path = os.path.join(directory, vocabulary['file'])
    written[vocabulary['file']] = {'bytes': os.path.getsize(path), 'sha256': sha256_of(path)}
  manifest = {
    'version': VERSION, 'task': dict(task), 'vocabulary': dict(vocabulary),
    'documents': documents, 'text_bytes': sum(s.text_bytes for s in shards),
    'empty_documents': sum(s.empty for s in shards),
    'features': {name: {'dtype': dtype_of(size).str, 'vocab_size': size,
                        'tokens': sum(s.tokens[name] for s in shards)}
                 for name, size in features.items()},
    'shards': [dataclasses.asdict(s) for s in shards],
    'inputs': [dict(i) for i in inputs], 'files': written}
  manifest['fingerprint'] = fingerprint_of(manifest)
  with atomic_file(os.path.join(directory, MANIFEST)) as file:
    file.write(json.dumps(manifest, sort_keys=True, indent=1).encode())
  for shard in shards:
    for name in (_table_file(shard.index), _info_file(shard.index)):
      with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, name))
  return manifest


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
  """Returns the sha256 over the task definition, the vocabulary and every shard of a manifest."""
  vocabulary = {k: v for k, v in manifest['vocabulary'].items() if k != 'file'}
  shards = [{k: v for k, v in s.items() if k != 'key'} for s in manifest['shards']]
  parts = [manifest['version'], manifest['task'], vocabulary, manifest['features'], shards]
  return hashlib.sha256(_canonical(parts)).hexdigest()


def sha256_of(path: str) -> str:
  """Returns the sha256 (hex) of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def dtype_of(vocab_size: int) -> np.dtype:
  """Returns the little-endian type tokens of a vocabulary are stored as: uint16 or uint32."""
  return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def shard_file(index: int, feature: str) -> str:
  """Returns the name of the file with a shard's tokens of a feature."""
  return f'shard-{index:05d}.{feature}.bin'


def _table_file(index: int) -> str:
  return f'shard-{index:05d}.documents.part'


def _info_file(index: int) -> str:
  return f'shard-{index:05d}.json'


def _columns(features: Collection[str]) -> dict[str, type]:
  several = {f'bytes.{name}': np.int64 for name in features} if len(features) > 1 else {}
  return {**_COLUMNS, **several}


def _table_dtype(features: Collection[str]) -> np.dtype:
  return np.dtype([*_columns(features).items(), ('hash', np.uint8, 16),
                   *((f'length.{name}', np.int64) for name in features)])


def _canonical(value: Any) -> bytes:
  return json.dumps(value, sort_keys=True).encode()


def _load_info(directory: str, index: int) -> tuple[ShardInfo, dict[str, list[str]]]:
  with open(os.path.join(directory, _info_file(index)), encoding='utf-8') as f:
    content = json.load(f)
  names = content.pop('names')
  return ShardInfo(**content), names


def _write_documents(documents: Iterable[Mapping[str, Any]], *, features: Mapping[str, int],
                     out: Mapping[str, _HashedFile]
                     ) -> tuple[np.ndarray, dict[str, list[str]], int]:
  files: dict[str, int] = {}
  tags: dict[str, int] = {}
  rows, empty = [], 0
  for document in documents:
    where = f'{document["file"]}, document {document["position"]}'
    tokens = document['features']
    if set(tokens) != set(features):
      raise ValueError(f'{where} has features {sorted(tokens)}, the store has {sorted(features)}')
    arrays = {name: _checked(tokens[name], size=features[name], where=f'{where}, {name}')
              for name in features}
    if not any(len(a) for a in arrays.values()):
      empty += 1
      continue
    for name, array in arrays.items():
      out[name].write(array.tobytes())
    tag = json.dumps(document.get('tags') or {}, sort_keys=True)
    if len(document['hash']) != 16:
      raise ValueError(f'{where}: hash has {len(document["hash"])} bytes, 16 are needed')
    rows.append((document['text_bytes'], document['position'],
                 files.setdefault(document['file'], len(files)), tags.setdefault(tag, len(tags)),
                 *_feature_bytes(document, features), np.frombuffer(document['hash'], np.uint8),
                 *(len(a) for a in arrays.values())))
  return np.array(rows, _table_dtype(features)), {'files': list(files), 'tags': list(tags)}, empty


def _feature_bytes(document: Mapping[str, Any], features: Mapping[str, int]) -> list[int]:
  if len(features) == 1:
    return []
  return [document.get('feature_bytes', {}).get(name, UNKNOWN) for name in features]


def _checked(tokens: Any, *, size: int, where: str) -> np.ndarray:
  array = np.asarray(tokens)
  if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
    raise ValueError(f'{where}: tokens must be a 1-D array of integers, got {array.dtype} '
                     f'{list(array.shape)}')
  if array.size and (array.min() < 0 or array.max() >= size):
    bad = int(array.max()) if array.max() >= size else int(array.min())
    raise ValueError(f'{where}: token {bad} is outside the vocabulary of {size} tokens (0 to '
                     f'{size - 1}); check that tokenizer and vocabulary belong together')
  return array.astype(dtype_of(size))


def _write_tables(directory: str, shards: Sequence[ShardInfo], features: Mapping[str, int]
                  ) -> dict[str, dict[str, Any]]:
  columns = [*_columns(features), 'hash', *(f'offsets.{name}' for name in features)]
  strings: dict[str, dict[str, int]] = {'files': {}, 'tags': {}}
  ends = dict.fromkeys(features, 0)
  with contextlib.ExitStack() as stack:
    out = {f'documents.{name}.bin': stack.enter_context(
      atomic_file(os.path.join(directory, f'documents.{name}.bin'))) for name in columns}
    for name in features:
      out[f'documents.offsets.{name}.bin'].write(np.uint64(0).tobytes())
    for shard in shards:
      table, names = _load_table(directory, shard, features)
      for column, kind in (('file', 'files'), ('tag', 'tags')):
        known = strings[kind]
        to_global = np.array([known.setdefault(n, len(known)) for n in names[kind]], np.int64)
        table[column] = to_global[table[column]] if len(table) else table[column]
      for column in [*_columns(features), 'hash']:
        out[f'documents.{column}.bin'].write(np.ascontiguousarray(table[column]).tobytes())
      for name in features:
        offsets = ends[name] + np.cumsum(table[f'length.{name}'], dtype=np.int64)
        out[f'documents.offsets.{name}.bin'].write(offsets.astype('<u8').tobytes())
        ends[name] = int(offsets[-1]) if len(offsets) else ends[name]
    for kind, known in strings.items():
      encoded = [n.encode() for n in known]
      file = stack.enter_context(atomic_file(os.path.join(directory, f'names.{kind}.bin')))
      file.write(b''.join(encoded))
      index = stack.enter_context(atomic_file(os.path.join(directory, f'names.{kind}.offsets.bin')))
      index.write(np.cumsum([0, *map(len, encoded)], dtype=np.uint64).tobytes())
      out |= {f'names.{kind}.bin': file, f'names.{kind}.offsets.bin': index}
  return {name: {'bytes': f.bytes, 'sha256': f.hash.hexdigest()} for name, f in out.items()}


def _load_table(directory: str, shard: ShardInfo, features: Mapping[str, int]
                ) -> tuple[np.ndarray, dict[str, list[str]]]:
  info, names = _load_info(directory, shard.index)
  table = np.fromfile(os.path.join(directory, _table_file(shard.index)), _table_dtype(features))
  if info != shard or len(table) != shard.documents:
    raise ValueError(f'shard {shard.index} of {directory} is not the one that was written: rerun '
                     f'prepare')
  return table, names
