"""Every document once, in order, for evaluation: finite, and exact about the text it covers."""

from collections.abc import Mapping, Sequence

import numpy as np

from t5x_like.data import denoising as denoising_lib
from t5x_like.data import objectives, order, vocabularies
from t5x_like.data import sources as sources_lib
from t5x_like.data import store as store_lib


class EvalLoader:
  """Batches that cover documents of the sources once, in order, concatenated into rows.

  Tokens with loss weight are those of whole documents, so that `bytes` is exactly their text: bits
  per byte is the summed loss over these batches / (ln 2 * bytes). In stores with inputs, whose
  tokens carry no loss, that is the text of the targets; `bytes` is None if a store does not say.

  With a denoising it is None too: what is hidden is no text by itself. Which tokens are hidden
  depends on the text, its place and `seed` alone, so that every evaluation and every model sees the
  same. Of a `denoising.Mixture` each way is applied to all documents, one way after the other:
  `parts` names them with their shares.

  Args:
    sources: names, or one name, or a mapping whose rates are not used.
    store_dir: folder with the stores, `<store_dir>/<source>/<split>`.
    batch_size: rows per batch over all processes.
    length: tokens per row.
    split: of every source.
    max_batches: at most this many batches, shared among the sources by their size; each source then
      ends at its last document that fits whole. Of a mixture of denoisings, for each of its ways.
    denoising: what is hidden from the rows, as in training; None: nothing.
    seed: of the hiding.

  Raises:
    ValueError: an argument or a store is not usable, or no document fits into max_batches.
  """

  def __init__(self, *, sources: sources_lib.Sources, store_dir: str, batch_size: int, length: int,
               split: str = 'validation', max_batches: int | None = None,
               denoising: denoising_lib.Denoising | None = None, seed: int = 0):
    sources_lib.check_positive(batch_size=batch_size, length=length)
    if max_batches is not None:
      sources_lib.check_positive(max_batches=max_batches)
    sources = sources_lib.named(sources, store_dir=store_dir)
    self.batch_size, self.length, self.split = batch_size, length, split
    self._sources = list(sources_lib.open_all(
      sources_lib.names_of(sources), store_dir=store_dir, split=split, length=length,
      packing='concat').values())
    rows = self._share(None if max_batches is None else max_batches * batch_size)
    self._documents = [self._whole_documents(s, r)
                       for s, r in zip(self._sources, rows, strict=True)]
    if not any(self._documents):
      raise ValueError(f'max_batches={max_batches} of {batch_size} rows of {length} tokens cover '
                       f'no whole document of {", ".join(s.name for s in self._sources)}: raise '
                       f'it')
    self._ends = [int(s.stream.starts(np.array([d]))[0])
                  for s, d in zip(self._sources, self._documents, strict=True)]
    self._bounds = np.cumsum([0, *(-(-end // length) for end in self._ends)])
    self.tokens = sum(self._ends)
    self.documents = sum(self._documents)
    self.bytes = self._target_bytes() if denoising is None else None
    self._denoising, self._seed = denoising, seed
    self._known = None if denoising is None else denoising_lib.vocabulary_of(
      self.stores, denoising=denoising, length=length)
    self._ways = (denoising.ways(length) if isinstance(denoising, denoising_lib.Mixture) else {})

  def __len__(self) -> int:
    return self._once * max(1, len(self._ways))

  @property
  def _once(self) -> int:
    """Batches that cover all documents."""
    return -(-int(self._bounds[-1]) // self.batch_size)

  @property
  def hides(self) -> bool:
    """Whether the targets are no text by themselves, so that no bytes can be counted."""
    return self._denoising is not None

  @property
  def parts(self) -> Mapping[str, float]:
    """Ways of denoising that are evaluated one after the other, with their shares in training."""
    return {name: share for name, (share, _) in self._ways.items()}

  def part(self, step: int) -> str:
    """Returns the name of the part that a batch belongs to; '' where there are none."""
    return list(self._ways)[step // self._once] if self._ways else ''

  def batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None
            ) -> dict[str, np.ndarray]:
    """Returns one batch, features as `Loader.batch`; rows beyond the end have no weight.

    Args:
      step: in [0, len(self)).
      rows: which rows of the global batch to return, in this order; None for all.
    """
    if not 0 <= step < len(self):
      raise ValueError(f'batch {step} does not exist: there are {len(self)}')
    chosen = np.arange(self.batch_size) if rows is None else np.asarray(rows, np.int64)
    g = step % self._once * self.batch_size + chosen
    parts = []
    for i, source in enumerate(self._sources):
      here = np.flatnonzero((g >= self._bounds[i]) & (g < self._bounds[i + 1]))
      if len(here):
        spans = source.objective.spans(g[here] - self._bounds[i])
        parts.append((source.stream, here, self._upto(spans, self._documents[i])))
    first = self._sources[0].store
    made = objectives.assemble(parts, rows=len(g), length=self.length, bos_id=first.bos_id,
                               pad_id=first.pad_id, attention='document')
    if self._denoising is None or self._known is None:
      return made
    source = np.minimum(np.searchsorted(self._bounds, g, side='right') - 1, len(self._sources) - 1)
    rngs = [denoising_lib.keyed(self._seed, source=self._sources[s].name, epoch=0, row=r)
            for s, r in zip(source.tolist(), (g - self._bounds[source]).tolist(), strict=True)]
    way = self._ways[self.part(step)][1] if self._ways else self._denoising
    return way.apply(made, rngs=rngs, vocabulary=self._known)

  @property
  def spec(self) -> dict[str, tuple[tuple[int, int], np.dtype]]:
    """Shape and dtype of each feature of the global batch."""
    if self._denoising is not None:
      return self._denoising.spec(self.batch_size, length=self.length)
    return objectives.spec(self.batch_size, length=self.length)

  @property
  def stores(self) -> dict[str, store_lib.Store]:
    """The open store of each source."""
    return {source.name: source.store for source in self._sources}

  @property
  def sources(self) -> list[str]:
    """Names of the sources, sorted."""
    return [s.name for s in self._sources]

  @property
  def vocab_size(self) -> int:
    """Number of tokens of the vocabulary."""
    return max(s.store.vocab_size for s in self._sources)

  @property
  def fingerprint(self) -> str:
    """Hash of everything that decides what the batches hold."""
    hidden = [] if self._denoising is None else [repr(self._denoising), self._seed]
    return store_lib.combined_fingerprint([
      {s.name: s.store.fingerprint for s in self._sources}, self._documents, self.batch_size,
      self.length, *hidden])

  def vocabulary(self) -> vocabularies.Vocabulary:
    """Returns the vocabulary of the stores: encode, decode, vocab_size, special ids."""
    return sources_lib.vocabulary_of(self._sources[0])

  def _target_bytes(self) -> int | None:
    total = 0
    for source, documents in zip(self._sources, self._documents, strict=True):
      lengths = source.store.feature_bytes('targets')
      if lengths is None:
        return None
      total += int(lengths[:documents].sum())
    return total

  def _share(self, limit: int | None) -> list[int]:
    rows = {s.name: s.objective.rows for s in self._sources}
    if limit is None or sum(rows.values()) <= limit:
      return list(rows.values())
    if limit < len(rows):
      raise ValueError(f'max_batches leaves {limit} rows for {len(rows)} sources: raise it')
    spare = {n: r - 1 for n, r in rows.items()}
    shared = order.apportion(spare, total=limit - len(rows))
    return [1 + shared[n] for n in rows]

  def _whole_documents(self, source: sources_lib.Source, rows: int) -> int:
    limit = rows * self.length
    if limit >= source.stream.tokens:
      return source.stream.documents
    return int(source.stream.find(np.array([limit]))[0])

  def _upto(self, spans: objectives.Spans, documents: int) -> objectives.Spans:
    keep = spans.document < documents
    return objectives.Spans(*(getattr(spans, name)[keep] for name in (
      'row', 'column', 'segment', 'document', 'start', 'length')))
