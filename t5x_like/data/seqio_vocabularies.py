"""Our vocabularies behind seqio's interface, and seqio's behind ours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text

from t5x_like.data import vocabularies


class SeqioVocabulary(seqio.Vocabulary):
  """One of our vocabularies for seqio: the same ids from Python and from TensorFlow.

  Args:
    ours: the vocabulary.
  """

  def __init__(self, ours: vocabularies.Vocabulary):
    super().__init__(extra_ids=ours.extra_ids)
    self.ours = ours

  @property
  def bos_id(self) -> int | None:
    return self.ours.bos_id

  @property
  def eos_id(self) -> int | None:
    return self.ours.eos_id

  @property
  def pad_id(self) -> int:
    return self.ours.pad_id

  @property
  def unk_id(self) -> int | None:
    return self.ours.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self.ours.vocab_size - self.extra_ids

  def _encode(self, s: str | bytes) -> Sequence[int]:
    return self.ours.encode(s.decode() if isinstance(s, bytes) else s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.ours.decode(ids)

  def decode(self, ids: Any) -> str:
    """Returns the text of ids, up to the first EOS; sentinels included."""
    return self.ours.decode(np.asarray(ids).tolist())

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    if isinstance(self.ours, vocabularies.ByteVocabulary):
      return seqio.ByteVocabulary().encode_tf(s)
    if isinstance(self.ours, vocabularies.SentencePieceVocabulary):
      return _sentencepiece(self.ours, s)

    def encode(text: Any) -> np.ndarray:
      return np.array(self.ours.encode(np.asarray(text).item().decode()), np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(rows: np.ndarray) -> Any:
      if rows.ndim == 1:
        return self.ours.decode(rows.tolist()).encode()
      return np.array([decode(row) for row in rows], object)

    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    text.set_shape(ids.shape[:-1])
    return text

  def __eq__(self, other: object) -> bool:
    return (isinstance(other, SeqioVocabulary)
            and self.ours.fingerprint() == other.ours.fingerprint())

  def __hash__(self) -> int:
    return hash(self.ours.fingerprint())

  def __str__(self) -> str:
    return f'{self.ours.kind} vocabulary {self.ours.fingerprint()[:12]}'


def _sentencepiece(ours: vocabularies.SentencePieceVocabulary, s: tf.Tensor) -> tf.Tensor:
  tokenizer: Any = tensorflow_text.SentencepieceTokenizer(model=ours.extended)
  if ours.escape_ids is None:
    return tokenizer.tokenize(s)
  # As `SentencePieceVocabulary.encode`: U+2581 between the parts travels as bytes.
  parts = tf.strings.split(tf.reshape(s, [1]), sep=vocabularies.ESCAPE).values
  ids = tokenizer.tokenize(parts)
  count = len(ours.escape_ids)
  repeats: Any = [tf.shape(parts)[0], 1]
  between = tf.tile(tf.constant([ours.escape_ids], tf.int32), repeats)
  joined: Any = tf.concat([ids, between], axis=1)
  return joined.flat_values[:-count]


def seqio_of(ours: vocabularies.Vocabulary) -> seqio.Vocabulary:
  """Returns the seqio vocabulary for one of ours; seqio's own for bytes, so that tasks may mix.

  Args:
    ours: the vocabulary.
  """
  if isinstance(ours, vocabularies.ByteVocabulary):
    return seqio.ByteVocabulary(extra_ids=ours.extra_ids)
  return SeqioVocabulary(ours)


def ours_of(vocabulary: seqio.Vocabulary) -> vocabularies.Vocabulary:
  """Returns the vocabulary a training process without seqio uses in place of one of seqio's.

  A vocabulary that only its own code can read becomes ids: it trains, but decodes to numbers.

  Args:
    vocabulary: of a seqio Feature.
  """
  if isinstance(vocabulary, SeqioVocabulary):
    return vocabulary.ours
  if type(vocabulary) is seqio.ByteVocabulary:
    return vocabularies.ByteVocabulary(extra_ids=vocabulary.extra_ids)
  if type(vocabulary) is seqio.SentencePieceVocabulary:
    ours = vocabularies.SentencePieceVocabulary(vocabulary.sentencepiece_model_file,
                                                extra_ids=vocabulary.extra_ids)
    if ours.extended == vocabulary.sp_model:
      return ours
  return vocabularies.IdVocabulary(vocab_size=vocabulary.vocab_size, eos_id=vocabulary.eos_id,
                                   pad_id=vocabulary.pad_id,
                                   identity=f'{type(vocabulary).__module__}.{vocabulary}')
