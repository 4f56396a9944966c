"""A seqio pipeline at training time, for preprocessing that cannot be written down in a store.

Batches come from TensorFlow one after the other, so unlike a store this cannot seek: its position
travels with the checkpoint, as the state of the tf.data iterator.
"""

import base64
import collections
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

# Before TensorFlow is imported: it reports every accelerator it cannot use, and needs none.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data import seqio_vocabularies, tasks, vocabularies

_FEATURES = {'inputs': 'decoder_input_tokens', 'targets': 'decoder_target_tokens',
             'segment_ids': 'decoder_segment_ids', 'positions': 'decoder_positions',
             'loss_weights': 'decoder_loss_weights'}


def vocabulary(*, task: str, modules: Sequence[str] = ()) -> vocabularies.Vocabulary:
  """Returns the vocabulary of the targets of a registered Task or Mixture.

  Args:
    task: its name.
    modules: modules to import that register it.

  Raises:
    ValueError: unknown task.
  """
  tasks.registered(task, modules=modules)
  features = seqio.get_mixture_or_task(task).output_features
  return seqio_vocabularies.ours_of(features['targets'].vocabulary)


def vocab_size(*, task: str, modules: Sequence[str] = (), multiple: int = 128) -> int:
  """Returns the vocabulary entries a model needs for a task; see `sources.vocab_size`.

  Args:
    task: its name.
    modules: modules to import that register it.
    multiple: the size is rounded up to one.

  Raises:
    ValueError: unknown task.
  """
  if multiple < 1:
    raise ValueError(f'multiple={multiple} must be at least 1')
  return -(-vocabulary(task=task, modules=modules).vocab_size // multiple) * multiple


class LiveLoader:
  """`batch(step)` from a registered seqio Task or Mixture, in the order tf.data gives.

  Examples are trimmed to their length and packed as seqio's decoder feature converter does. A task
  with inputs and targets becomes a prefix and a continuation, with loss on the continuation only.
  The stream depends on the task, its arguments here and the TensorFlow version alone.

  Args:
    task: name of the Task or Mixture.
    batch_size: rows.
    length: tokens per row.
    seed: of the shuffle and of random preprocessing.
    split: of the task.
    modules: modules to import that register the task.
    packing: 'pack' puts several examples in a row, 'none' one.
    input_length: most tokens of length taken by inputs, for a task that has them; default half.
    history: batches before the current position kept in the state, so that a checkpoint may be
      behind what was prefetched.

  Raises:
    ValueError: unknown task, split or setting.
  """

  def __init__(self, *, task: str, batch_size: int, length: int, seed: int, split: str = 'train',
               modules: Sequence[str] = (), packing: Literal['pack', 'none'] = 'pack',
               input_length: int | None = None, history: int = 4):
    tasks.registered(task, modules=modules)
    self._provider = tasks.seedable(seqio.get_mixture_or_task(task))
    if split not in self._provider.splits:
      raise ValueError(f'{task!r} has no split {split!r}; it has: '
                       f'{", ".join(sorted(self._provider.splits))}')
    if packing not in ('pack', 'none'):
      raise ValueError(f"packing={packing!r} is unknown; allowed: 'pack', 'none'")
    if min(batch_size, length) < 1 or history < 0:
      raise ValueError(f'batch_size={batch_size} and length={length} must be at least 1, '
                       f'history={history} at least 0')
    self._split, self._packing = split, packing
    self.task, self.batch_size, self.length, self.seed = task, batch_size, length, seed
    self._lengths = self._feature_lengths(input_length)
    self._recent: collections.OrderedDict[int, dict[str, np.ndarray]] = collections.OrderedDict()
    self._history = max(history, 1)
    self._lock = threading.Lock()
    self._iterator: Any = None
    self._next = 0

  def batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None
            ) -> dict[str, np.ndarray]:
    """Returns the features of a step; any but the next few steps are reached by replaying.

    Args:
      step: >= 0.
      rows: which rows of the global batch to return, in this order; None for all.

    Returns:
      inputs, targets, segment_ids (0 is padding), positions: int32 [rows, length];
      loss_weights: float32 [rows, length].
    """
    if step < 0:
      raise ValueError(f'step must be 0 or more, got {step}')
    with self._lock:
      if step not in self._recent:
        self._go_to(step)
        while self._next <= step:
          self._read()
      found = self._recent[step]
    return dict(found) if rows is None else {k: v[np.asarray(rows)] for k, v in found.items()}

  def state(self) -> bytes:
    """Returns what `restore` needs to go on from the last batches given."""
    with self._lock:
      files = self._save_iterator()
      recent = io.BytesIO()
      np.savez_compressed(recent, allow_pickle=False, **{
        f'{step}/{name}': array for step, batch in self._recent.items()
        for name, array in batch.items()})
      return json.dumps({
        'fingerprint': self.fingerprint, 'next': self._next,
        'recent': base64.b64encode(recent.getvalue()).decode(),
        'iterator': {n: base64.b64encode(d).decode() for n, d in files.items()}}).encode()

  def restore(self, state: bytes) -> None:
    """Goes on where `state` was taken.

    Raises:
      ValueError: the state is damaged, or of another task or other settings.
    """
    try:
      found = json.loads(state)
      files = {n: base64.b64decode(d) for n, d in found['iterator'].items()}
      recent = np.load(io.BytesIO(base64.b64decode(found['recent'])), allow_pickle=False)
      step, fingerprint = int(found['next']), found['fingerprint']
    except (ValueError, KeyError, TypeError, OSError) as error:
      raise ValueError(f'the state of the live data is damaged: {error}') from None
    if fingerprint != self.fingerprint:
      raise ValueError(f'the state is not of {self.task!r} with these settings: batch_size, '
                       f'length, seed, split, packing and the code of the task must be the same')
    with self._lock:
      self._iterator, self._next = self._start(), step
      self._recent.clear()
      for key in recent.files:
        at, name = key.split('/')
        self._recent.setdefault(int(at), {})[name] = recent[key]
      if files:
        self._load_iterator(files)
      else:
        self._skip(step)

  @property
  def spec(self) -> dict[str, tuple[tuple[int, int], np.dtype]]:
    """Shape and dtype of each feature of the global batch."""
    return {name: ((self.batch_size, self.length),
                   np.dtype(np.float32 if name == 'loss_weights' else np.int32))
            for name in _FEATURES}

  @property
  def fingerprint(self) -> str:
    """Hash of what decides the stream, as far as it can be seen."""
    members = getattr(self._provider, 'tasks', [self._provider])
    parts = [self.task, self._split, self.batch_size, self.length, self.seed, self._packing,
             self._lengths, tf.__version__,
             [[tasks.described(t.source), tasks.described(t.preprocessors)] for t in members]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

  @property
  def vocab_size(self) -> int:
    """Number of tokens of the vocabulary."""
    return self.vocabulary().vocab_size

  @property
  def bos_id(self) -> int:
    """First input of every document."""
    return self.vocabulary().bos_id or self.pad_id

  @property
  def pad_id(self) -> int:
    """Fills the rest of a row."""
    return 0

  @property
  def eos_id(self) -> int | None:
    """Last token of a document, if the vocabulary has one."""
    return self.vocabulary().eos_id

  def vocabulary(self) -> vocabularies.Vocabulary:
    """Returns the vocabulary of the targets."""
    return seqio_vocabularies.ours_of(self._provider.output_features['targets'].vocabulary)

  def describe(self, step: int = 0) -> dict[str, Any]:
    """Returns the task, its rates and settings; JSON-able."""
    del step  # How many epochs there were is not known to a live pipeline.
    members = getattr(self._provider, 'tasks', [self._provider])
    rates = {t.name: float(self._provider.get_rate(t)) if len(members) > 1 else 1.0
             for t in members}
    return {'task': self.task, 'rates': rates, 'batch_size': self.batch_size, 'length': self.length,
            'packing': self._packing, 'fingerprint': self.fingerprint}

  def _feature_lengths(self, input_length: int | None) -> dict[str, int]:
    names = set(self._provider.output_features)
    if names == {'targets'}:
      if input_length is not None:
        raise ValueError(f'{self.task!r} has no inputs, so input_length={input_length} would have '
                         f'no effect; leave it out')
      return {'targets': self.length}
    if names != {'inputs', 'targets'}:
      raise ValueError(f'{self.task!r} has features {sorted(names)}; a decoder takes targets, or '
                       f'inputs and targets')
    inputs = self.length // 2 if input_length is None else input_length
    if not 0 < inputs < self.length:
      raise ValueError(f'input_length={inputs} must be at least 1 and below length={self.length}')
    return {'inputs': inputs, 'targets': self.length - inputs}

  def _start(self) -> Iterator[Mapping[str, tf.Tensor]]:
    dataset = self._provider.get_dataset(
      sequence_length=self._lengths, split=self._split, shuffle=True, seed=self.seed,
      num_epochs=None, try_in_mem_cache=False)
    converter = seqio.DecoderFeatureConverter(pack=self._packing == 'pack', bos_id=self.bos_id)
    dataset = converter(dataset, task_feature_lengths=self._lengths)
    dataset = dataset.batch(self.batch_size, drop_remainder=True)
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return iter(dataset.with_options(options))

  def _go_to(self, step: int) -> None:
    if self._iterator is None or step < self._next:
      self._iterator, self._next = self._start(), 0
      self._recent.clear()
      self._skip(max(step - self._history + 1, 0))

  def _skip(self, steps: int) -> None:
    if steps > 0:
      print(f'live data of {self.task!r}: replaying {steps} batches to reach that step',
            file=sys.stderr)
    for _ in range(steps):
      next(self._iterator)
    self._next = steps

  def _read(self) -> None:
    example = next(self._iterator)
    found = {name: example[theirs].numpy() for name, theirs in _FEATURES.items()
             if theirs in example}
    if self._packing == 'none':
      real = (found['targets'] != self.pad_id) | (found['loss_weights'] != 0)
      # Padding only ever follows the last real token.
      real = np.flip(np.maximum.accumulate(np.flip(real, 1), axis=1), 1)
      found['segment_ids'] = real.astype(np.int32)
      found['positions'] = np.arange(self.length, dtype=np.int32)[None, :] * found['segment_ids']
    self._recent[self._next] = {
      name: found[name].astype(np.float32 if name == 'loss_weights' else np.int32)
      for name in _FEATURES}
    self._next += 1
    while len(self._recent) > self._history:
      self._recent.popitem(last=False)

  def _save_iterator(self) -> dict[str, bytes]:
    if self._iterator is None:
      return {}
    with tempfile.TemporaryDirectory() as folder:
      try:
        tf.train.Checkpoint(iterator=self._iterator).write(os.path.join(folder, 'iterator'))
      except tf.errors.OpError as error:
        print(f'live data of {self.task!r}: tf.data cannot save its position, so resuming will '
              f'replay the batches so far: {str(error).splitlines()[0]}', file=sys.stderr)
        return {}
      files = {}
      for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), 'rb') as file:
          files[name] = file.read()
      return files

  def _load_iterator(self, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
      for name, data in files.items():
        with open(os.path.join(folder, os.path.basename(name)), 'wb') as file:
          file.write(data)
      try:
        tf.train.Checkpoint(iterator=self._iterator).read(
          os.path.join(folder, 'iterator')).assert_consumed()
      except (tf.errors.OpError, AssertionError) as error:
        raise ValueError(f'the position of the live data {self.task!r} cannot be restored, '
                         f'perhaps after a change of TensorFlow: {error}') from None
