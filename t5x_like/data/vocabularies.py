"""Vocabularies without TensorFlow: SentencePiece, bytes, and Hugging Face tokenizer.json.

All follow T5: pad is 0 where the file does not say otherwise, a document ends in EOS, which
`encode` never adds. SentencePiece models trained by `pieces` lose nothing:
decode(encode(text)) == text.
"""

import difflib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import sentencepiece
import tokenizers
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

ESCAPE = '\u2581'  # What SentencePiece writes for a space, so a real one has to travel as bytes.


class Vocabulary(Protocol):
  """Text to ids and back.

  Attributes:
    kind: 'sentencepiece', 'bytes', 'tokenizer.json' or 'ids'.
    path: the file it was read from, None if it has none.
    vocab_size: ids are in [0, vocab_size).
    pad_id, eos_id, bos_id, unk_id: special ids, None where the vocabulary has none (pad is then 0).
  """

  kind: ClassVar[str]
  path: str | None
  vocab_size: int
  extra_ids: int
  pad_id: int
  eos_id: int | None
  bos_id: int | None
  unk_id: int | None

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, up to the first EOS; padding is dropped."""
    ...

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    ...


class ByteVocabulary:
  """UTF-8 bytes after three special ids, as `seqio.ByteVocabulary` and ByT5 (arXiv:2105.13626).

  Args:
    extra_ids: sentinel ids added at the end.
  """

  kind: ClassVar[str] = 'bytes'
  path: str | None = None
  pad_id: int = 0
  eos_id: int | None = 1
  unk_id: int | None = 2
  bos_id: int | None = None

  def __init__(self, *, extra_ids: int = 0):
    self.extra_ids = extra_ids
    self.vocab_size = 259 + extra_ids

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, up to the first EOS; ids of no byte are dropped."""
    kept = _until(ids, self.eos_id)
    return bytes(i - 3 for i in kept if 3 <= i < 259).decode(errors='ignore')

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return _fingerprint(self.kind, b'', self.extra_ids)


class SentencePieceVocabulary:
  """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226), unigram or BPE.

  Args:
    path: the .model file.
    extra_ids: sentinel ids added at the end, as `seqio.SentencePieceVocabulary` does.

  Raises:
    ValueError: no such file, or no model in it.
  """

  kind: ClassVar[str] = 'sentencepiece'

  def __init__(self, path: str, *, extra_ids: int = 0):
    self.path: str | None = path
    self.extra_ids = extra_ids
    self.model = _read(path)
    self._load()

  @property
  def extended(self) -> bytes:
    """The model with its sentinels as pieces, numbered from the end as seqio does."""
    proto: Any = sentencepiece_model_pb2  # Its classes are made when it is imported.
    model = proto.ModelProto.FromString(self.model)
    for i in reversed(range(self.extra_ids)):
      model.pieces.add(piece=f'{ESCAPE}<extra_id_{i}>', score=0.0,
                       type=proto.ModelProto.SentencePiece.USER_DEFINED)
    return model.SerializeToString()

  def _load(self) -> None:
    self._processor: Any = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.load_from_serialized_proto(self.extended if self.extra_ids else self.model)
    except (RuntimeError, message.DecodeError) as error:
      raise ValueError(f'{self.path} is not a SentencePiece model: {error}') from None
    p = self._processor
    self.vocab_size: int = p.get_piece_size()
    self.pad_id: int = max(p.pad_id(), 0)
    self.eos_id: int | None = _some(p.eos_id())
    self.bos_id: int | None = _some(p.bos_id())
    self.unk_id: int | None = _some(p.unk_id())
    # The ids that stand for U+2581, where the model can spell any byte and keeps every space.
    ids = [p.piece_to_id(f'<0x{b:02X}>') for b in ESCAPE.encode()]
    keeps = p.decode(p.encode(' a  b ')) == ' a  b '
    self.escape_ids = ids if keeps and all(p.is_byte(i) for i in ids) else None

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    if self.escape_ids is None or ESCAPE not in text:
      return self._processor.encode(text)
    ids: list[int] = []
    for i, part in enumerate(text.split(ESCAPE)):
      ids += [*(self.escape_ids if i else ()), *self._processor.encode(part)]
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, up to the first EOS; padding is dropped."""
    drop = {self.pad_id, self.eos_id, self.bos_id}
    kept = [i for i in _until(ids, self.eos_id) if i not in drop and i < self.vocab_size]
    return self._processor.decode(kept)

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return _fingerprint(self.kind, self.model, self.extra_ids)

  def __getstate__(self) -> dict[str, Any]:
    return {'path': self.path, 'extra_ids': self.extra_ids, 'model': self.model}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._load()


class TokenizerJsonVocabulary:
  """A Hugging Face tokenizer.json; special ids are those of the named tokens it has.

  Args:
    path: the tokenizer.json file.
    eos: token that ends a document; default the first of the usual names the file has.
    pad: token for padding; default the first of the usual names, else id 0.
    extra_ids: sentinel ids added at the end.

  Raises:
    ValueError: no such file, no tokenizer in it, or a named token it lacks.
  """

  kind: ClassVar[str] = 'tokenizer.json'
  _EOS = ('</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '<|im_end|>', '[SEP]')
  _PAD = ('<pad>', '[PAD]', '<|pad|>', '<|finetune_right_pad_id|>')
  _BOS = ('<s>', '<|begin_of_text|>', '<bos>', '[CLS]')
  _UNK = ('<unk>', '[UNK]')

  def __init__(self, path: str, *, eos: str | None = None, pad: str | None = None,
               extra_ids: int = 0):
    self.path: str | None = path
    self._eos, self._pad, self.extra_ids = eos, pad, extra_ids
    self.model = _read(path)
    self._load()

  def _load(self) -> None:
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(self.model)
    except Exception as error:  # The library raises plain Exception.
      raise ValueError(f'{self.path} is not a tokenizer.json: {error}') from None
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    ids = self._tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
      raise ValueError(f'{self.path} is a tokenizer.json without any token')
    # Ids may have gaps, so their number does not bound them.
    self._base = max(ids.values()) + 1
    self.vocab_size = self._base + self.extra_ids
    self.eos_id = self._special(ids, self._eos, self._EOS)
    self.pad_id = self._special(ids, self._pad, self._PAD) or 0
    self.bos_id = self._special(ids, None, self._BOS)
    self.unk_id = self._special(ids, None, self._UNK)

  def _special(self, ids: Mapping[str, int], name: str | None, usual: Sequence[str]) -> int | None:
    if name is not None and name not in ids:
      raise ValueError(f'{self.path} has no token {name!r}{_nearest(name, ids)}')
    return next((ids[n] for n in ([name] if name else usual) if n in ids), None)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, up to the first EOS; special tokens are dropped."""
    kept = [i for i in _until(ids, self.eos_id) if i < self._base and i != self.eos_id]
    return self._tokenizer.decode(kept, skip_special_tokens=True)

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return _fingerprint(self.kind, self.model, self.extra_ids, self.eos_id, self.pad_id)

  def __getstate__(self) -> dict[str, Any]:
    return {k: self.__dict__[k] for k in ('path', '_eos', '_pad', 'extra_ids', 'model')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._load()


class IdVocabulary:
  """Ids written as numbers, for a task whose own vocabulary only its own code can read.

  Args:
    vocab_size: ids are in [0, vocab_size).
    eos_id: id that ends a document.
    identity: tells vocabularies of the same size apart.
  """

  kind: ClassVar[str] = 'ids'
  path: str | None = None
  extra_ids: int = 0
  bos_id: int | None = None
  unk_id: int | None = None

  def __init__(self, *, vocab_size: int, eos_id: int | None = None, pad_id: int = 0,
               identity: str = ''):
    self.vocab_size, self.pad_id, self.identity = vocab_size, pad_id, identity
    self.eos_id: int | None = eos_id

  def encode(self, text: str) -> list[int]:
    """Returns the ids written in a text as numbers between spaces."""
    return [int(word) for word in text.split()]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the ids, up to the first EOS, as numbers between spaces."""
    return ' '.join(str(i) for i in _until(ids, self.eos_id))

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return _fingerprint(self.kind, b'', self.vocab_size, self.eos_id, self.identity)


def load(source: str, *, extra_ids: int = 0) -> Vocabulary:
  """Returns the vocabulary a name or file stands for.

  Args:
    source: 'bytes', or the path of a SentencePiece .model or a Hugging Face .json file.
    extra_ids: sentinel ids added at the end.

  Raises:
    ValueError: neither of these, or an unreadable file.
  """
  if source == 'bytes':
    return ByteVocabulary(extra_ids=extra_ids)
  source = os.path.expanduser(source)
  if source.endswith('.json'):
    return TokenizerJsonVocabulary(source, extra_ids=extra_ids)
  if source.endswith(('.model', '.spm')) or os.path.exists(source):
    return SentencePieceVocabulary(source, extra_ids=extra_ids)
  raise ValueError(f"vocabulary {source!r} is unknown; allowed: 'bytes', or the path of a "
                   f'SentencePiece .model or a Hugging Face tokenizer.json'
                   f'{_nearest(source, ["bytes"])}')


def describe(vocabulary: Vocabulary, *, directory: str | None = None) -> dict[str, Any]:
  """Returns what a store's manifest says about its vocabulary, and copies its file beside it.

  Args:
    vocabulary: any of this module.
    directory: where to copy the vocabulary's file; None copies nothing.
  """
  described = {'kind': vocabulary.kind, 'fingerprint': vocabulary.fingerprint(),
               'extra_ids': vocabulary.extra_ids,
               **{k: getattr(vocabulary, k)
                  for k in ('vocab_size', 'pad_id', 'eos_id', 'bos_id', 'unk_id')}}
  if vocabulary.path is not None:
    described['file'] = 'vocabulary' + os.path.splitext(vocabulary.path)[1]
    if directory is not None:
      shutil.copyfile(vocabulary.path, os.path.join(directory, described['file']))
  return described


def from_manifest(described: Mapping[str, Any], *, directory: str) -> Vocabulary:
  """Returns the vocabulary of a store.

  Args:
    described: the 'vocabulary' of its manifest.
    directory: the store.

  Raises:
    ValueError: an unknown kind, or a file that is not the one the store was written with.
  """
  kind, extra_ids = described['kind'], described.get('extra_ids', 0)
  if kind == 'ids':
    return IdVocabulary(vocab_size=described['vocab_size'], eos_id=described['eos_id'],
                        pad_id=described['pad_id'])
  if kind == 'bytes':
    return ByteVocabulary(extra_ids=extra_ids)
  readers = {c.kind: c for c in (SentencePieceVocabulary, TokenizerJsonVocabulary)}
  if kind not in readers:
    raise ValueError(f'{directory} has a vocabulary of kind {kind!r}; known: '
                     f'{", ".join(sorted([*readers, "bytes", "ids"]))}')
  path = os.path.join(directory, described['file'])
  vocabulary = readers[kind](path, extra_ids=extra_ids)
  # Which tokens end and pad a document may have been chosen when the store was written.
  vocabulary.eos_id, vocabulary.pad_id = described['eos_id'], described['pad_id']
  if vocabulary.fingerprint() != described['fingerprint']:
    raise ValueError(f'{path} is not the vocabulary this store was written with; delete '
                     f'{directory} and rerun prepare')
  return vocabulary


@functools.lru_cache(maxsize=8)
def _read_stamped(path: str, stamp: tuple[int, int]) -> bytes:
  del stamp  # Part of the cache's key only.
  with open(path, 'rb') as file:
    return file.read()


def _read(path: str) -> bytes:
  try:
    stat = os.stat(path)
    return _read_stamped(path, (stat.st_size, stat.st_mtime_ns))
  except OSError as error:
    raise ValueError(f'cannot read vocabulary {path}: {error.strerror}') from None


def _some(index: int) -> int | None:
  return index if index >= 0 else None


def _until(ids: Iterable[int], eos_id: int | None) -> list[int]:
  kept = [int(i) for i in ids]
  return kept[:kept.index(eos_id)] if eos_id is not None and eos_id in kept else kept


def _fingerprint(kind: str, model: bytes, *rest: Any) -> str:
  return hashlib.sha256(json.dumps([kind, *rest]).encode() + b'\0' + model).hexdigest()


def _nearest(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(known), n=1)
  return f'; did you mean {close[0]!r}?' if close else ''
