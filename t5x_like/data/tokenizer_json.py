"""The tokenizer.json of a published model, without TensorFlow and without transformers."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import tokenizers

from t5x_like.data import published, vocabulary_files

_USUAL = {
  'eos': ('</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '<|im_end|>', '[SEP]'),
  'pad': ('<pad>', '[PAD]', '<|pad|>', '<|finetune_right_pad_id|>'),
  # GPT-2 begins a document with the token that ended the one before.
  'bos': ('<s>', '<|begin_of_text|>', '<bos>', '[CLS]', '<|endoftext|>'),
  'unk': ('<unk>', '[UNK]'),
  'mask': ('[MASK]', '<mask>'),
}


class TokenizerJsonVocabulary:
  """A Hugging Face tokenizer.json, or the vocab.json and merges.txt of GPT-2.

  Special ids are those chosen here, else those the file's own post-processor adds, else those of
  the usual names it has.

  Args:
    path: the tokenizer.json, or a vocab.json with merges.txt beside it.
    eos: token that ends a document.
    pad: token for padding; default the first of the usual names, else id 0.
    extra_ids: sentinel ids added at the end.
    special: token or id by role ('bos', 'eos', 'pad', 'unk'); None for a role without a token.

  Raises:
    ValueError: no such file, no tokenizer in it, or a named token it lacks.
  """

  kind: ClassVar[str] = 'tokenizer.json'

  def __init__(self, path: str, *, eos: str | None = None, pad: str | None = None,
               extra_ids: int = 0, special: vocabulary_files.Special | None = None):
    self.path: str | None = path
    self.extra_ids = extra_ids
    self.special = {**(special or {}), **{role: token for role, token in
                                          (('eos', eos), ('pad', pad)) if token is not None}}
    old = os.path.basename(path) == 'vocab.json'
    self.model: bytes | None = published.byte_level(path) if old else vocabulary_files.read(path)
    self._load()

  def _load(self) -> None:
    assert self.model is not None
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(self.model)
    except Exception as error:  # The library raises plain Exception.
      raise ValueError(f'{self.path} is not a tokenizer.json: {error}') from None
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    ids = self._tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
      raise ValueError(f'{self.path} is a tokenizer.json without any token')
    found = vocabulary_files.special_ids(
      self.path, own=_own(published.in_tokenizer(self.model), ids), special=self.special,
      tokens=lambda: ids)
    # Ids may have gaps, so their number does not bound them.
    self._base = max([*ids.values(), *(i for i in found.values() if i is not None)]) + 1
    self.vocab_size = self._base + self.extra_ids
    self.eos_id, self.bos_id, self.unk_id = found['eos'], found['bos'], found['unk']
    self.pad_id = found['pad'] or 0
    self.mask_id = found['mask']
    # T5's file has its own: <extra_id_0> is the last token, and the others lie before it.
    self.sentinels = self.extra_ids or next(
      i for i in range(self._base + 1) if ids.get(f'<extra_id_{i}>') != self._base - 1 - i)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens around it; those it names are one id."""
    return self._encode(text, add_special_tokens=False)

  def encode_with_special(self, text: str) -> list[int]:
    """Returns the ids of a text with the special tokens that the file puts around it."""
    return self._encode(text, add_special_tokens=True)

  def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
      return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except TypeError:  # What the library says of half a character is that it is no text.
      raise vocabulary_files.no_text(text) from None

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, up to the first EOS; special tokens are dropped."""
    kept = [i for i in vocabulary_files.until(ids, self.eos_id)
            if 0 <= i < self._base and i != self.eos_id]
    return self._tokenizer.decode(kept, skip_special_tokens=True)

  def decode_with_special(self, ids: Iterable[int]) -> str:
    """Returns the text of all ids, special tokens by their names."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

  def fingerprint(self) -> str:
    """Returns a hash (hex) that is equal for vocabularies which give equal ids."""
    return vocabulary_files.fingerprint(self.kind, self.model or b'', self.extra_ids, self.eos_id,
                                        self.pad_id)

  def __getstate__(self) -> dict[str, Any]:
    return {k: self.__dict__[k] for k in ('path', 'special', 'extra_ids', 'model')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._load()


def _own(said: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, int | None]:
  return {role: next((ids[n] for n in (said.get(role, ''), *_USUAL[role]) if n in ids), None)
          for role in vocabulary_files.ROLES}
