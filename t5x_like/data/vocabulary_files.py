"""What vocabularies of any kind do with their files, their ids and their special tokens."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from t5x_like import names

Special = Mapping[str, str | int | None]
ROLES = ('bos', 'eos', 'pad', 'unk', 'mask')


@functools.lru_cache(maxsize=8)
def _read_stamped(path: str, stamp: tuple[int, int]) -> bytes:
  del stamp  # Part of the cache's key only.
  with open(path, 'rb') as file:
    return file.read()


def read(path: str) -> bytes:
  """Returns the contents of a vocabulary's file, read again only after a change.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    stat = os.stat(path)
    return _read_stamped(path, (stat.st_size, stat.st_mtime_ns))
  except OSError as error:
    raise ValueError(f'cannot read vocabulary {path}: {error.strerror}') from None


def until(ids: Iterable[int], eos_id: int | None) -> list[int]:
  """Returns the ids before the first EOS, as Python's own numbers."""
  kept = [int(i) for i in ids]
  return kept[:kept.index(eos_id)] if eos_id is not None and eos_id in kept else kept


def no_text(text: str) -> ValueError:
  """Returns the error for a text that cannot be encoded, which names the place."""
  at = next((i for i, c in enumerate(text) if '\ud800' <= c <= '\udfff'), 0)
  return ValueError(f'the text holds half a character, {text[at:at + 1]!a} at {at}, after '
                    f'{text[max(0, at - 20):at]!a}; is it UTF-8?')


def fingerprint(kind: str, model: bytes, *rest: Any) -> str:
  """Returns a hash (hex) of a vocabulary's kind, file and settings."""
  return hashlib.sha256(json.dumps([kind, *rest]).encode() + b'\0' + model).hexdigest()


def special_ids(path: str | None, *, own: Mapping[str, int | None], special: Special,
                tokens: Callable[[], Mapping[str, int]]) -> dict[str, int | None]:
  """Returns the id of each role: what was chosen, else what the file itself says.

  Args:
    path: of the file, for messages.
    own: id by role as the file says.
    special: token or id by role, None for a role that is to have none.
    tokens: returns the id of every token the file has.

  Raises:
    ValueError: an unknown role, or a token the file lacks.
  """
  found = dict(own)
  for role, token in special.items():
    if role not in ROLES:
      raise ValueError(f'{role!r} is no role of a special token; allowed: {", ".join(ROLES)}')
    if isinstance(token, str):
      known = tokens()
      if token not in known and role == 'mask':
        continue  # Many files name one that they do not have, and only masking needs it.
      if token not in known:
        raise ValueError(f'{path} has no token {token!r}{names.suggest(token, known)} It is to be '
                         f'{role}: name another with {role}=')
      token = known[token]
    found[role] = token
  return found
