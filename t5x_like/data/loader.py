"""batch(step) for training: a pure function of the stores, the mixture, the seed and the step."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.data import denoising as denoising_lib
from t5x_like.data import objectives, order, vocabularies
from t5x_like.data import sources as sources_lib
from t5x_like.data import store as store_lib

VERSION = 1
Changes = Sequence[tuple[int, Mapping[str, float]]]


class Loader:
  """Batches of a mixture by step, in any order, on any number of processes.

  Args:
    sources: rate of each source by name; or names, whose rates are then their tokens; or one name.
    store_dir: folder with the stores, `<store_dir>/<source>/<split>`.
    split: of every source.
    batch_size: rows per step over all processes.
    length: tokens per row.
    seed: of the shuffles and of the mixing.
    packing: 'concat' cuts the stream of documents into rows; 'pack' fits whole documents into rows;
      'none' is one document per row, padded or cut.
    attention: 'document' numbers the documents of a row as segments; 'row' makes a row one segment.
    temperature: rates are raised to 1 / temperature, > 0 (1 keeps them).
    changes: (step, rates) pairs; from the first period that begins at or after the step, these are
      the rates, a source left out having none.
    denoising: what is hidden from the rows, as by `denoising.SpanCorruption()`; None: nothing, each
      token predicts the next.
    period: rows over which the rates, rounded to whole rows, hold exactly.

  Raises:
    ValueError: an argument, a rate or a store is not usable; the text says which and how to fix it.
  """

  def __init__(self, *, sources: sources_lib.Sources, store_dir: str, batch_size: int, length: int,
               seed: int, split: str = 'train', packing: objectives.Packing = 'concat',
               attention: objectives.Attention = 'document', temperature: float = 1.0,
               changes: Changes = (), period: int = 4096,
               denoising: denoising_lib.Denoising | None = None):
    sources_lib.check_positive(batch_size=batch_size, length=length, period=period)
    sources_lib.check_choice(packing, name='packing', allowed=objectives.PACKINGS)
    sources_lib.check_choice(attention, name='attention', allowed=('document', 'row'))
    if not temperature > 0:
      raise ValueError(f'temperature must be above 0, got {temperature!r}')
    sources = sources_lib.named(sources, store_dir=store_dir)
    self.batch_size, self.length, self.seed = batch_size, length, seed
    self._packing: objectives.Packing = packing
    self._denoising = denoising
    self._attention: objectives.Attention = attention
    self._sources = sources_lib.open_all(sources_lib.names_of(sources), store_dir=store_dir,
                                         split=split, length=length, packing=packing)
    self._first = next(iter(self._sources.values()))
    self._known = None if denoising is None else denoising_lib.vocabulary_of(
      self.stores, denoising=denoising, length=length)
    self._rates = self._all_rates(sources, changes=changes, temperature=temperature)
    self._order = order.Order(
      sizes={n: s.objective.rows for n, s in self._sources.items()},
      keys={n: s.store.fingerprint for n, s in self._sources.items()},
      rates=self._rates, batch_size=batch_size, period=period, seed=seed)

  def batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None
            ) -> dict[str, np.ndarray]:
    """Returns the features of a step.

    Args:
      step: >= 0.
      rows: which rows of the global batch to return, in this order; None for all.

    Returns:
      inputs, targets, segment_ids (0 is padding), positions: int32 [rows, length];
      loss_weights: float32 [rows, length]; or what the denoising makes of them.
    """
    g = self._global_rows(step, rows)
    source, epoch, row = self._order.rows(g)
    parts = []
    for s in np.unique(source):
      here = np.flatnonzero(source == s)
      opened = self._sources[self._order.names[s]]
      parts.append((opened.stream, here, opened.objective.spans(row[here])))
    made = objectives.assemble(parts, rows=len(g), length=self.length, bos_id=self.bos_id,
                               pad_id=self.pad_id, attention=self._attention)
    if self._denoising is None or self._known is None:
      return made
    rngs = [denoising_lib.keyed(self.seed, source=self._order.names[s], epoch=e, row=r)
            for s, e, r in zip(source.tolist(), epoch.tolist(), row.tolist(), strict=True)]
    return self._denoising.apply(made, rngs=rngs, vocabulary=self._known)

  @property
  def spec(self) -> dict[str, tuple[tuple[int, int], np.dtype]]:
    """Shape and dtype of each feature of the global batch."""
    if self._denoising is not None:
      return self._denoising.spec(self.batch_size, length=self.length)
    return objectives.spec(self.batch_size, length=self.length)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of everything that decides what batch(step) returns."""
    # Left out where there is none, so that older runs keep their fingerprint.
    hidden = [] if self._denoising is None else [repr(self._denoising)]
    return store_lib.combined_fingerprint([
      VERSION, {n: s.store.fingerprint for n, s in self._sources.items()},
      [[f.first, f.counts.tolist()] for f in self._order.phases], self._order.period,
      self.batch_size, self.length, self.seed, self._packing, self._attention, *hidden])

  @property
  def stores(self) -> dict[str, store_lib.Store]:
    """The open store of each source."""
    return {name: source.store for name, source in self._sources.items()}

  @property
  def vocab_size(self) -> int:
    """Number of tokens of the vocabulary."""
    return max(s.store.vocab_size for s in self._sources.values())

  @property
  def bos_id(self) -> int:
    """First input of every document."""
    return self._first.store.bos_id

  @property
  def pad_id(self) -> int:
    """Fills the rest of a row."""
    return self._first.store.pad_id

  @property
  def eos_id(self) -> int | None:
    """Last token of a document, if the vocabulary has one."""
    return self._first.store.eos_id

  def vocabulary(self) -> vocabularies.Vocabulary:
    """Returns the vocabulary of the stores: encode, decode, vocab_size, special ids."""
    return sources_lib.vocabulary_of(self._first)

  def describe(self, step: int = 0) -> dict[str, Any]:
    """Returns what the mixture holds and how far it is at a step.

    Returns:
      JSON-able: 'sources', by name 'tokens', 'documents', 'bytes', 'rows' (of one epoch),
      'cut_tokens' (in no row, with packing 'none'), 'epochs' (read before the step) and
      'fingerprint'; 'phases', each with 'step' it was asked for, 'first_row' where it begins, and
      by source the 'rates' asked for and the 'rows' they become in each period; 'period'.
    """
    consumed = self._order.consumed(step * self.batch_size)
    described = {
      name: {'tokens': s.stream.tokens, 'documents': s.stream.documents,
             'bytes': s.store.text_bytes, 'rows': s.objective.rows,
             'cut_tokens': s.objective.cut_tokens(), 'epochs': consumed[name] / s.objective.rows,
             'fingerprint': s.store.fingerprint}
      for name, s in self._sources.items()}
    phases = [
      {'step': at, 'first_row': phase.first * self._order.period, 'rates': dict(rates),
       'rows': dict(zip(self._order.names, phase.counts.tolist(), strict=True))}
      for (at, rates), phase in zip(sorted(self._rates.items()), self._order.phases, strict=True)]
    return {'sources': described, 'phases': phases, 'period': self._order.period,
            'batch_size': self.batch_size, 'length': self.length, 'packing': self._packing,
            'attention': self._attention, 'fingerprint': self.fingerprint}

  def contents(self, step: int) -> list[dict[str, Any]]:
    """Returns the pieces of documents in a step.

    Returns:
      By row, then column: 'row', 'column', 'length', 'source', 'epoch', 'source_row', 'document',
      'start' (in the document, tokens), and 'lineage' (file, position, hash, bytes, tags).
    """
    source, epoch, row = self._order.rows(self._global_rows(step, None))
    out = []
    for i in range(self.batch_size):
      opened = self._sources[self._order.names[source[i]]]
      spans = opened.objective.spans(row[i:i + 1])
      for column, length, document, start in zip(
          *(x.tolist() for x in (spans.column, spans.length, spans.document, spans.start)),
          strict=True):
        out.append({'row': i, 'column': column, 'length': length, 'source': opened.name,
                    'epoch': int(epoch[i]), 'source_row': int(row[i]), 'document': document,
                    'start': start, 'lineage': opened.store.lineage(document)})
    return out

  def locate(self, document: str, *, epochs: int = 1) -> list[dict[str, Any]]:
    """Returns where a document is read: the inverse of `contents`.

    Args:
      document: 'source:number', a content hash (32 hex digits), or a source file's name.
      epochs: how many epochs of its source to look through, from the first.

    Returns:
      In order of the run: 'step', 'row', 'source', 'document', 'epoch', 'source_row'.

    Raises:
      ValueError: there is no such document.
    """
    sources_lib.check_positive(epochs=epochs)
    out = []
    for name, index in sources_lib.locate_document(self._sources, document):
      rows = self._sources[name].objective.rows_of(index)
      row = np.tile(rows, epochs)
      epoch = np.repeat(np.arange(epochs), len(rows))
      g = self._order.find(name, rows=row, epochs=epoch)
      out += [{'step': at // self.batch_size, 'row': at % self.batch_size, 'source': name,
               'document': index, 'epoch': e, 'source_row': r}
              for at, e, r in zip(g.tolist(), epoch.tolist(), row.tolist(), strict=True) if at >= 0]
    return sorted(out, key=lambda x: (x['step'], x['row'], x['document']))

  def document_tokens(self, source: str, document: int) -> np.ndarray:
    """Returns the tokens of a document as the model reads them, int32 [its length]."""
    stream = self._sources[source].stream
    start, end = stream.starts(np.array([document, document + 1]))
    return stream.read(np.array([document]), starts=np.array([0]), lengths=np.array([end - start]))

  def _global_rows(self, step: int, rows: Sequence[int] | np.ndarray | None) -> np.ndarray:
    if step < 0:
      raise ValueError(f'step must be 0 or more, got {step}')
    chosen = np.arange(self.batch_size) if rows is None else np.asarray(rows, np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= self.batch_size):
      raise ValueError(f'rows must lie in 0 to {self.batch_size - 1}, got {chosen.min()} to '
                       f'{chosen.max()}')
    return int(step) * self.batch_size + chosen

  def _all_rates(self, sources: sources_lib.Sources, *, changes: Changes, temperature: float
                 ) -> dict[int, dict[str, float]]:
    if isinstance(sources, Mapping):
      first = {n: float(sources[n]) for n in self._sources}
    else:
      first = {n: float(s.stream.tokens) for n, s in self._sources.items()}
    out = {0: first}
    for step, rates in changes:
      sources_lib.check_positive(step=step)
      if step in out:
        raise ValueError(f'changes gives rates for step {step} twice: keep one')
      order.check_names(rates, known=list(self._sources))
      out[step] = dict(rates)
    return {step: {n: r ** (1 / temperature) if r > 0 else r for n, r in rates.items()}
            for step, rates in out.items()}
