"""Token stores of made-up documents, written as `t5x_like.prepare` writes them."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_like.data import shards, store, vocabularies

MEAN_TOKENS = 400
_EOS = 1
_FIRST = 3  # Ids below are padding, EOS and unknown.


def write(store_dir: str, *, source: str, tokens: int, vocab: int, split: str = 'train') -> None:
  """Writes one store of random ids with documents of uneven length.

  Args:
    store_dir: folder of the stores.
    source: name of the source; decides the ids too.
    tokens: at least this many.
    vocab: ids are below it, > 3.
    split: of the source.
  """
  vocabulary = vocabularies.IdVocabulary(vocab_size=vocab, eos_id=_EOS, identity='bench')
  folder = os.path.join(store_dir, source, split)
  features = {'targets': vocab}
  written = shards.write_shard(folder, index=0, features=features, documents=_documents(
    f'{source}/{split}', tokens=tokens, vocab=vocab))
  store.finish_store(folder, shards=[written], features=features,
                     task={'name': source, 'split': split},
                     vocabulary=vocabularies.describe(vocabulary, directory=folder))


def _documents(name: str, *, tokens: int, vocab: int) -> Iterator[dict[str, Any]]:
  key = hashlib.sha256(name.encode()).digest()
  random = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], 'little')))
  position = 0
  while tokens > 0:
    # Lengths of real documents are roughly lognormal; this spread gives a long tail.
    length = int(np.clip(random.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0), 8, 20_000))
    ids = random.integers(_FIRST, vocab, length)
    ids[-1] = _EOS
    yield {'features': {'targets': ids}, 'text_bytes': 4 * length, 'file': f'{name}.txt',
           'position': position, 'hash': hashlib.sha256(ids.tobytes()).digest()[:16]}
    tokens -= length
    position += 1
