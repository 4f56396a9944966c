"""What a language model has to beat: a unigram model, gzip -9 and xz -9e, primed with the
training text, in bits per byte of the same held-out documents.

The report measures them. To have them ready by then, measure them while the model trains:

    nice python -m t5x_like.baselines --gin_file=my_baselines.gin &

where the gin file imports this module and binds the arguments of `baselines.baselines`.
"""

import concurrent.futures
import json
import lzma
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from t5x_like import config, tables
from t5x_like.data import sources as sources_lib
from t5x_like.data import store as store_lib
from t5x_like.data import vocabularies

# What deflate can look back on: its window less the longest match and its lookahead.
_DEFLATE_WINDOW = 32768 - 262
_XZ_DICTIONARY = 64 << 20  # The dictionary of xz -9.
_CHUNK_TOKENS = 1 << 22
_FORMAT = 2


def count_tokens(tokens: Any, *, vocab_size: int) -> np.ndarray:
  """Counts how often each token occurs.

  Args:
    tokens: flat array (or anything sliced like one), ids in [0, vocab_size).
    vocab_size: number of tokens.

  Returns:
    int64 [vocab_size].
  """
  counts = np.zeros(vocab_size, np.int64)
  for start in range(0, len(tokens), _CHUNK_TOKENS):
    counts += np.bincount(tokens[start:start + _CHUNK_TOKENS], minlength=vocab_size)
  return counts


def unigram_bits(train_counts: np.ndarray, *, heldout_counts: np.ndarray) -> float:
  """Code length of held-out tokens under add-one smoothed training frequencies (Laplace).

  Args:
    train_counts: [vocab_size].
    heldout_counts: [vocab_size].

  Returns:
    Bits.
  """
  smoothed = train_counts.astype(np.float64) + 1
  return float(-(heldout_counts * np.log2(smoothed / smoothed.sum())).sum())


def gzip_bits(documents: Iterable[bytes], *, train: bytes) -> float:
  """Size of documents under gzip -9's method (deflate), each primed with training text.

  Each document is coded alone, as the model codes it, with the end of the training text as its
  dictionary, as much of it as deflate can look back on. No gzip header or checksum is counted.

  Args:
    documents: held-out texts.
    train: training text.

  Returns:
    Bits.
  """
  dictionary = train[-_DEFLATE_WINDOW:]
  total = 0
  for document in documents:
    if dictionary:
      packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary)
    else:
      packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    total += len(packer.compress(document)) + len(packer.flush())
  return 8.0 * total


def xz_bytes(text: bytes) -> int:
  """Size of a text under xz -9e.

  Args:
    text: any bytes.

  Returns:
    Bytes. The dictionary is no larger than the text, which saves memory and changes nothing.
  """
  dictionary = max(4096, min(_XZ_DICTIONARY, len(text)))
  filters = [{'id': lzma.FILTER_LZMA2, 'preset': 9 | lzma.PRESET_EXTREME, 'dict_size': dictionary}]
  packer = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
  size = len(packer.compress(text))
  return size + len(packer.flush())


def compression_bits(documents: Sequence[Sequence[bytes]], *, train: Sequence[bytes]
                     ) -> dict[str, float]:
  """Codes held-out documents with both compressors at once, one thread per pass.

  gzip is primed with the training text of a document's own source. xz reads all the training text
  and then all held-out documents as one stream: size(train + held-out) - size(train). So, unlike
  the model, it also learns from one held-out document for the next.

  Args:
    documents: held-out texts of each source.
    train: training text of each source.

  Returns:
    {'gzip': bits, 'xz': bits}.
  """
  primer = b''.join(train)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:  # Both libraries release the GIL.
    both = pool.submit(xz_bytes, primer + b''.join(d for of in documents for d in of))
    alone = pool.submit(xz_bytes, primer)
    gzip = [pool.submit(gzip_bits, of, train=text)
            for of, text in zip(documents, train, strict=True)]
    return {'gzip': sum(g.result() for g in gzip), 'xz': 8.0 * (both.result() - alone.result())}


def spread(count: int, *, share: float) -> Iterator[int]:
  """Picks documents evenly.

  Args:
    count: documents there are.
    share: of them to pick, in (0, 1].

  Returns:
    Ascending indexes.
  """
  return (i for i in range(count) if int((i + 1) * share) > int(i * share))


def text_of(store: store_lib.Store, *, share: float) -> tuple[list[bytes], int]:
  """Decodes the targets of documents of a store, evenly spread.

  Args:
    store: with text in its feature 'targets'.
    share: of the documents, in (0, 1].

  Returns:
    One UTF-8 text per document, end-of-sequence tokens left out, and how many of them differ in
    length from the text the document was made from.
  """
  vocabulary = vocabularies.from_manifest(store.manifest['vocabulary'], directory=store.path)
  lengths = store.feature_bytes()
  documents, altered = [], 0
  for index in spread(store.num_documents, share=share):
    ids = store.document_tokens(index)
    documents.append(vocabulary.decode(ids[ids != store.eos_id].tolist()).encode())
    altered += lengths is not None and len(documents[-1]) != lengths[index]
  return documents, altered


def measure(train: Sequence[store_lib.Store], *, heldout: Sequence[store_lib.Store],
            train_limit: int = 16 << 20, heldout_limit: int = 16 << 20) -> dict[str, Any]:
  """Measures the baselines on the targets of sources taken together.

  Args:
    train: what to learn from, one store per source.
    heldout: what to code, sources in the same order.
    train_limit: bytes of training text the compressors are primed with, at most.
    heldout_limit: bytes of held-out text they code, at most.

  Returns:
    'bits_per_byte': {'unigram', 'gzip', 'xz'}, and on what they were measured (JSON-able). Where a
    store does not say how many bytes its targets are, 'bits_per_byte' is {} and 'unknown' says why.
  """
  begin = time.monotonic()
  counts = [sum(count_tokens(s.tokens(), vocab_size=s.vocab_size) for s in of)
            for of in (train, heldout)]
  size = [_target_bytes(of) for of in (train, heldout)]
  found = {
    'bits_per_byte': {},
    'with_inputs': any(len(s.features) > 1 for s in heldout),
    'train_tokens': int(np.sum(counts[0])),
    'heldout_tokens': int(np.sum(counts[1])),
    'heldout_documents': sum(s.num_documents for s in heldout),
  }
  if None in size:
    silent = [s.path for s in (*train, *heldout) if s.feature_bytes() is None]
    return {**found, 'unknown': f'{silent[0]} has several features and does not say how many bytes '
                                'of its text are targets: prepare it again'}
  train_bytes, heldout_bytes = (s or 0 for s in size)
  training, altered = _texts(train, share=train_limit / max(1, train_bytes))
  documents, altered_heldout = _texts(heldout, share=heldout_limit / max(1, heldout_bytes))
  primers = [b''.join(of) for of in training]
  coded = max(1, sum(len(d) for of in documents for d in of))
  bits = compression_bits(documents, train=primers)
  unigram = unigram_bits(np.asarray(counts[0]), heldout_counts=np.asarray(counts[1]))
  return {
    **found,
    'bits_per_byte': {'unigram': unigram / max(1, heldout_bytes), 'gzip': bits['gzip'] / coded,
                      'xz': bits['xz'] / coded},
    'train_bytes': train_bytes,
    'train_bytes_primed': sum(map(len, primers)),
    'heldout_bytes': heldout_bytes,
    'heldout_bytes_coded': coded,
    'documents_altered': int(altered + altered_heldout),
    'seconds': round(time.monotonic() - begin, 3),
  }


def _target_bytes(stores: Sequence[store_lib.Store]) -> int | None:
  sizes = [store.feature_bytes() for store in stores]
  return None if any(s is None for s in sizes) else sum(int(s.sum()) for s in sizes
                                                        if s is not None)


def _texts(stores: Sequence[store_lib.Store], *, share: float) -> tuple[list[list[bytes]], int]:
  found = [text_of(store, share=min(1.0, share)) for store in stores]
  return [texts for texts, _ in found], sum(altered for _, altered in found)


def baselines(*, store_dir: str, source: sources_lib.Sources, train_split: str = 'train',
              split: str = 'validation', train_limit: int = 16 << 20,
              heldout_limit: int = 16 << 20) -> dict[str, Any]:
  """Measures the baselines of sources, or reads them where this was done before.

  The result is kept in the folder of the first source under a name made of what it depends on, so
  that a call in the background, during training, makes the report's call instant.

  Args:
    store_dir: folder that holds the stores.
    source: what the model is trained on: a source, several, a mixture by name or with its rates.
      Several are taken together, as the evaluation takes them, whatever their rates.
    train_split: split to learn from.
    split: held-out split.
    train_limit: as in `measure`.
    heldout_limit: as in `measure`.

  Returns:
    As `measure`, and 'sources', their names, and 'split'.

  Raises:
    ValueError: if there is no such store, or vocabularies differ.
  """
  store_dir = os.path.expanduser(store_dir)
  names, train, heldout = _open(source, store_dir=store_dir, splits=(train_split, split))
  key = store_lib.combined_fingerprint(
    [_FORMAT, [s.fingerprint for s in train], [s.fingerprint for s in heldout], train_limit,
     heldout_limit])
  path = os.path.join(store_dir, names[0], f'baselines-{key[:16]}.json')
  try:
    with open(path, encoding='utf-8') as file:
      return {**json.load(file), 'split': split}
  except (OSError, ValueError):  # Not there yet, or torn by a kill: measure.
    pass
  size = tables.bytes_text(min(sum(s.text_bytes for s in train), train_limit))
  print(f'measuring unigram, gzip and xz on {size} of training text (about a second per MiB)',
        file=sys.stderr, flush=True)
  found = {'sources': names, 'split': split,
           **measure(train, heldout=heldout, train_limit=train_limit, heldout_limit=heldout_limit)}
  temporary = f'{path}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      json.dump(found, file, indent=1)
    os.replace(temporary, path)
  except OSError as error:  # A store may be read-only; the numbers are good all the same.
    print(f'warning: baselines are not kept for the next time: {error}', file=sys.stderr)
  return found


def _open(source: sources_lib.Sources, *, store_dir: str, splits: Sequence[str]
          ) -> tuple[list[str], list[store_lib.Store], list[store_lib.Store]]:
  names = sources_lib.names_of(sources_lib.named(source, store_dir=store_dir))
  train, heldout = ([store_lib.Store(store_lib.store_path(store_dir, source=name, split=split))
                     for name in names] for split in splits)
  sources_lib.check_one_vocabulary(dict(zip(names, train, strict=True)))
  return names, train, heldout


def dry_run(*, store_dir: str, source: sources_lib.Sources, train_split: str = 'train',
            split: str = 'validation', train_limit: int = 16 << 20,
            heldout_limit: int = 16 << 20) -> None:
  """Says what `baselines` would read, without computing anything.

  Args:
    store_dir: as in `baselines`.
    source: as in `baselines`.
    train_split: as in `baselines`.
    split: as in `baselines`.
    train_limit: as in `measure`.
    heldout_limit: as in `measure`.
  """
  _, train, heldout = _open(source, store_dir=store_dir, splits=(train_split, split))
  for stores, limit in ((train, train_limit), (heldout, heldout_limit)):
    for store in stores:
      print(f'{store.path}: {store.num_documents:,} documents, {store.num_tokens():,} tokens, '
            f'{tables.bytes_text(store.text_bytes)} of text')
    print(f'of it at most {tables.bytes_text(limit)} for the compressors')


if __name__ == '__main__':
  sys.exit(config.run('t5x_like.baselines.baselines'))
