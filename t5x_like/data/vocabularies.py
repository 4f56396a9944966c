"""Vocabularies without TensorFlow: SentencePiece, bytes, and Hugging Face tokenizer.json.

All follow T5: pad is 0 where the file does not say otherwise, a document ends in EOS, which
`encode` never adds. SentencePiece models trained by `pieces` lose nothing:
decode(encode(text)) == text. `load` takes the folder of a published model.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import sentencepiece
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

from t5x_like import names
from t5x_like.data import published, shards, tokenizer_json, vocabulary_files

ESCAPE = '\u2581'  # What SentencePiece writes for a space, so a real one has to travel as bytes.
REQUIRED = '\n\t'  # Characters that `pieces` demands: it marks the models trained there.

TokenizerJsonVocabulary = tokenizer_json.TokenizerJsonVocabulary


class Vocabulary(Protocol):
  """Text to ids and back.

  Attributes:
    kind: 'sentencepiece', 'bytes', 'tokenizer.json' or 'ids'.
    path: the file it was read from, None if it has none.
    model: contents of its file as a store keeps it, None if it has none.
    vocab_size: ids are in [0, vocab_size).
    pad_id, eos_id, bos_id, unk_id: special ids, None where the vocabulary has none (pad is then 0).
  """

  kind: ClassVar[str]
  path: str | None
  model: bytes | None
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
  model: bytes | None = None
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
    kept = vocabulary_files.until(ids, self.eos_id)
    return bytes(i - 3 for i in kept if 3 <= i < 259).decode(errors='ignore')

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return vocabulary_files.fingerprint(self.kind, b'', self.extra_ids)


class SentencePieceVocabulary:
  """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226), unigram or BPE.

  Args:
    path: the .model file.
    extra_ids: sentinel ids added at the end, as `seqio.SentencePieceVocabulary` does.
    special: token or id by role ('bos', 'eos', 'pad', 'unk'), None for a role without a token; a
      role left out is as the file says.

  Raises:
    ValueError: no such file, or no model in it.
  """

  kind: ClassVar[str] = 'sentencepiece'

  def __init__(self, path: str, *, extra_ids: int = 0,
               special: vocabulary_files.Special | None = None):
    self.path: str | None = path
    self.extra_ids, self.special = extra_ids, dict(special or {})
    self.model: bytes | None = vocabulary_files.read(path)
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
    self._pieces: int = p.get_piece_size()
    own = {'bos': p.bos_id(), 'eos': p.eos_id(), 'pad': p.pad_id(), 'unk': p.unk_id(), 'mask': -1}
    own = {role: index if index >= 0 else None for role, index in own.items()}
    found = vocabulary_files.special_ids(
      self.path, own=own, special=self.special,
      tokens=lambda: {p.id_to_piece(i): i for i in range(self._pieces)})
    # Without a token of its own, padding is 0.
    self.special = {role: i for role, i in found.items()
                    if i != own[role] and not (role == 'pad' and not i and not own[role])}
    # A token that was added to a published model lies behind its pieces.
    self.vocab_size: int = max([self._pieces, *(i + 1 for i in found.values() if i is not None)])
    self.eos_id, self.bos_id, self.unk_id = found['eos'], found['bos'], found['unk']
    self.pad_id: int = found['pad'] or 0
    self.mask_id: int | None = found['mask']
    self._dropped = {found['pad'], self.eos_id, self.bos_id} - {self.unk_id}
    # The ids that stand for U+2581 in a model of our own, which spells any byte. In the others it
    # stays what they take it for, a space.
    ids = [p.piece_to_id(f'<0x{b:02X}>') for b in ESCAPE.encode()]
    proto: Any = sentencepiece_model_pb2
    trainer = proto.ModelProto.FromString(self.model).trainer_spec
    ours = trainer.required_chars == REQUIRED and all(p.is_byte(i) for i in ids)
    self.escape_ids = ids if ours else None

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    try:
      return self._encode(text)
    except RuntimeError:  # What the library says of half a character.
      raise vocabulary_files.no_text(text) from None

  def _encode(self, text: str) -> list[int]:
    if self.escape_ids is None or ESCAPE not in text:
      return self._processor.encode(text)
    ids: list[int] = []
    for i, part in enumerate(text.split(ESCAPE)):
      ids += [*(self.escape_ids if i else ()), *self._processor.encode(part)]
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, up to the first EOS; padding is dropped."""
    kept = [i for i in vocabulary_files.until(ids, self.eos_id)
            if i not in self._dropped and 0 <= i < self._pieces]
    return self._processor.decode(kept)

  def encode_with_special(self, text: str) -> list[int]:
    """Returns the ids of a text after BOS, as Llama's, or before EOS where there is none, as T5's.
    """
    ids = self.encode(text)
    if self.bos_id is not None:
      return [self.bos_id, *ids]
    return ids if self.eos_id is None else [*ids, self.eos_id]

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    chosen = [[r, self.special[r]] for r in ('eos', 'pad') if r in self.special]
    return vocabulary_files.fingerprint(self.kind, self.model or b'', self.extra_ids,
                                        *([chosen] if chosen else []))

  def __getstate__(self) -> dict[str, Any]:
    return {k: self.__dict__[k] for k in ('path', 'special', 'extra_ids', 'model')}

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
  model: bytes | None = None
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
    return ' '.join(str(i) for i in vocabulary_files.until(ids, self.eos_id))

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return vocabulary_files.fingerprint(self.kind, b'', self.vocab_size, self.eos_id, self.identity)


def load(source: str, *, extra_ids: int | None = None, eos: str | None = None,
         pad: str | None = None, bos: str | None = None) -> Vocabulary:
  """Returns the vocabulary a name, a file or the folder of a published model stands for.

  The special tokens are those named here, else those that tokenizer_config.json or
  special_tokens_map.json beside the file name, else those of the file.

  Args:
    source: 'bytes', the path of a SentencePiece .model or of a Hugging Face .json file, or a folder
      with one: tokenizer.json, tokenizer.model, spiece.model, or vocab.json with merges.txt.
    extra_ids: sentinel ids added at the end; None: as the files say, else none.
    eos: token that ends a document.
    pad: token for padding.
    bos: token that begins a document.

  Raises:
    ValueError: none of these, an unreadable file, or a token it lacks.
  """
  given = {role: token for role, token in (('eos', eos), ('pad', pad), ('bos', bos))
           if token is not None}
  if source == 'bytes':
    if given:
      raise ValueError(f"vocabulary 'bytes' has tokens of its own, so {', '.join(given)} would "
                       f'have no effect: leave it out')
    return ByteVocabulary(extra_ids=extra_ids or 0)
  source = os.path.expanduser(source)
  path = published.tokenizer_file(source) if os.path.isdir(source) else source
  if not (path.endswith(('.json', '.model', '.spm')) or os.path.exists(path)):
    raise ValueError(f"vocabulary {source!r} is unknown; allowed: 'bytes', the path of a "
                     f'SentencePiece .model or a Hugging Face tokenizer.json, or the folder of a '
                     f'model{names.suggest(source, ["bytes"]) if source.isalnum() else ""}')
  said = published.said_beside(path)
  special: dict[str, str | int | None] = {**said.special, **given}
  if path.endswith('.json'):
    return TokenizerJsonVocabulary(path, extra_ids=extra_ids or 0, special=special)
  pieces = {role: said.added.get(token, token) if isinstance(token, str) else token
            for role, token in special.items()}
  return SentencePieceVocabulary(path, special=pieces, extra_ids=(
    said.extra_ids if extra_ids is None else extra_ids))


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
  # Only what there is, so that stores without keep their fingerprints.
  for name, usual in (('sentinels', vocabulary.extra_ids), ('mask_id', None)):
    if (value := getattr(vocabulary, name, usual)) != usual:
      described[name] = value
  if vocabulary.path is not None:
    described['file'] = 'vocabulary' + os.path.splitext(vocabulary.path)[1]
    if directory is not None and vocabulary.model is not None:
      with shards.atomic_file(os.path.join(directory, described['file'])) as file:
        file.write(vocabulary.model)
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
  # Which tokens begin, end and pad a document was decided when the store was written.
  special: dict[str, str | int | None] = {role: described.get(f'{role}_id')
                                          for role in vocabulary_files.ROLES}
  vocabulary = readers[kind](path, extra_ids=extra_ids, special=special)
  if vocabulary.fingerprint() != described['fingerprint']:
    raise ValueError(f'{path} is not the vocabulary this store was written with; delete '
                     f'{directory} and rerun prepare')
  return vocabulary
