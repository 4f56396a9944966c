"""Tiny models, stores and runs that many tests share."""

import hashlib
import os

import jax
import numpy as np
import optax

from models.config import DecoderConfig
from models.decoder import DecoderLM
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import losses, state, step
from t5x_like.data import shards, store, vocabularies

VOCAB = 64
# Added to the environment of a process that sees the real device, and compiles in half the time.
ONE_DEVICE = {'XLA_FLAGS': '--xla_backend_optimization_level=0'}


def model(**settings) -> DecoderLM:
  """A decoder of some thousand parameters; `settings` override its configuration."""
  base = dict(vocab=VOCAB, embed=16, layers=2, heads=4, mlp=32, dtype='float32',
              layer_loop='unroll', max_length=64)
  return DecoderLM(config=DecoderConfig(**{**base, **settings}))


def structure(definition=None, rules=None, **sizes) -> state.Structure:
  """The model on a mesh; one device unless sizes say otherwise."""
  mode = sizes.pop('mode', 'auto')
  count = int(np.prod(list(sizes.values()))) if sizes else 1
  mesh = mesh_lib.make_mesh(devices=count, mode=mode, **(sizes or {'data': 1}))
  return state.describe(definition or model(), mesh, rules or rules_lib.fsdp_tensor())


def batch(rows: int = 8, length: int = 16, *, seed: int = 0, documents: int = 2
          ) -> dict[str, np.ndarray]:
  """Rows of random tokens cut into documents, with some padding at the end of each row."""
  random = np.random.default_rng(seed)
  targets = random.integers(3, VOCAB, (rows, length)).astype(np.int32)
  segments = np.sort(random.integers(1, documents + 1, (rows, length)), 1).astype(np.int32)
  segments[:, length - length // 8:] = 0
  starts = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
  inputs = np.where(starts, 0, np.roll(targets, 1, 1)).astype(np.int32)
  index = np.arange(length)[None]
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), 1)
  return {'inputs': inputs, 'targets': targets, 'segment_ids': segments,
          'positions': positions.astype(np.int32),
          'loss_weights': (segments > 0).astype(np.float32)}


class Batches:
  """A loader of random batches."""

  fingerprint = 'toy'
  vocab_size = VOCAB

  def __init__(self, rows: int = 8, length: int = 16):
    self.rows, self.length = rows, length

  @property
  def spec(self):
    return {name: (x.shape, x.dtype) for name, x in batch(self.rows, self.length).items()}

  def batch(self, step, rows=None):
    made = batch(self.rows, self.length, seed=step)
    return made if rows is None else {name: x[np.asarray(rows)] for name, x in made.items()}


def steps(described, definition, count: int, *, optimizer=None, loader=None, loss=None, **settings):
  """Runs a few train steps; returns the final state and the metrics of each."""
  optimizer = optimizer or optax.adamw(1e-2)
  loader = loader or Batches()
  loss = loss or losses.next_token
  shapes = step.batch_shapes(loader.spec, described,
                             microbatches=settings.get('microbatches', 1))
  abstract = state.abstract(described, optimizer, ema=settings.get('ema') is not None)
  made = step.make(described, optimizer, loss, seed=settings.pop('seed', 0), **settings)
  compiled = step.lower(made, described, abstract, shapes).compile()
  current = state.initial(definition, described, optimizer, seed=0,
                          ema=settings.get('ema') is not None)
  found = []
  for i in range(count):
    current, metrics = compiled(current, step.place(loader, i, shapes))
    found.append({name: float(x) for name, x in metrics.items()})
  return current, found


def write_store(directory, *, source: str = 'toy', documents: int = 60, seed: int = 0,
                splits=('train', 'validation'), extra_ids: int = 0) -> str:
  """Writes byte-level stores of made-up words; returns the store directory."""
  vocabulary = vocabularies.load('bytes', extra_ids=extra_ids)
  random = np.random.default_rng(seed)
  words = [''.join(chr(97 + c) for c in random.integers(0, 26, n))
           for n in random.integers(1, 8, 40)]
  for number, split in enumerate(splits):
    folder = os.path.join(directory, source, split)
    texts = [' '.join(random.choice(words, random.integers(1, 30))) + '.'
             for _ in range(documents // (1 + 4 * number))]
    rows = [{'features': {'targets': np.array([*vocabulary.encode(t), vocabulary.eos_id])},
             'text_bytes': len(t.encode()), 'file': f'{source}.txt', 'position': i,
             'hash': hashlib.sha256(t.encode()).digest()[:16]} for i, t in enumerate(texts)]
    sizes = {'targets': vocabulary.vocab_size}
    shard = shards.write_shard(folder, index=0, documents=rows, features=sizes)
    store.finish_store(folder, shards=[shard], features=sizes, task={'name': source},
                       vocabulary=vocabularies.describe(vocabulary, directory=folder))
  return str(directory)


def tree_equal(a, b) -> bool:
  """Whether two trees of arrays are bit-identical."""
  same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
  return all(jax.tree.leaves(same))
