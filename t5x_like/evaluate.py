"""Held-out loss and bits per byte: a hook of training, and `python -m t5x_like.evaluate`."""

import sys

from t5x_like import config

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  sys.exit(config.run('t5x_like.evaluate.evaluate'))

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from partitioning import rules as rules_lib
from t5x_like import checkpoints, losses, provenance
from t5x_like import state as state_lib
from t5x_like import step as step_lib
from t5x_like.hooks import Run
from t5x_like.state import Structure


class FiniteLoader(Protocol):
  """Held-out batches: see `t5x_like.data.loader.EvalLoader`."""

  @property
  def spec(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
    """Global shape and dtype per feature."""
    ...

  @property
  def bytes(self) -> int | None:
    """Bytes of the text of all targets, None if unknown."""
    ...

  def __len__(self) -> int: ...

  def batch(self, step: int, rows: Any = None) -> Mapping[str, np.ndarray]:
    """One of the `len` batches."""
    ...


class Evaluator:
  """Sums the next-token loss over every batch of a finite loader; compiled once."""

  def __init__(self, structure: Structure, loader: FiniteLoader):
    self._loader, self._structure = loader, structure
    self._shapes = step_lib.batch_shapes(loader.spec, structure)
    self._compiled: Any = None

  def _lower(self) -> Any:
    def sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
      module = self._structure.module(params)
      logits = module(batch['inputs'], positions=batch['positions'],
                      segment_ids=batch['segment_ids'])
      nll, _ = losses.cross_entropy(logits, batch['targets'])
      weights = batch['loss_weights'].astype(jnp.float32)
      hits = (jnp.argmax(logits, -1) == batch['targets']) * weights
      return jnp.sum(nll * weights), jnp.sum(weights), jnp.sum(hits)

    structure = self._structure
    with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
      return jax.jit(sums).lower(structure.shapes, self._shapes).compile()

  def __call__(self, params: Any) -> dict[str, float]:
    """Evaluates.

    Args:
      params: nested dict of arrays on the structure's mesh.
    Returns:
      'loss' (nats per token), 'perplexity', 'accuracy', 'tokens'; and, where the loader knows the
      bytes of the targets, 'bits_per_byte' and 'bytes'.
    Raises:
      ValueError: the loader has no token to score.
    """
    if self._compiled is None:
      self._compiled = self._lower()
    totals = np.zeros(3)
    for i in range(len(self._loader)):
      batch = step_lib.place(self._loader, i, self._shapes)  # pyright: ignore
      totals += np.array([float(x) for x in jax.device_get(self._compiled(params, batch))])
    nll, tokens, hits = totals
    if tokens == 0:
      raise ValueError('the held-out data has no token to score')
    found = {'loss': nll / tokens, 'perplexity': math.exp(min(nll / tokens, 700.0)),
             'accuracy': hits / tokens, 'tokens': tokens}
    size = self._loader.bytes
    return found if not size else {
        **found, 'bytes': size, 'bits_per_byte': nll / math.log(2) / size}


class Perplexity:
  """A hook: held-out loss and bits per byte every so many updates, and after the last."""

  def __init__(self, *, loader: FiniteLoader, every: int, name: str = 'eval'):
    """Makes the hook.

    Args:
      loader: held-out batches.
      every: updates between evaluations; 0 means only after the last.
      name: prefix of the metrics, and part of the file's name: evaluation-NAME.json for another
        than 'eval'. Each hook of a run needs its own.
    """
    if every < 0:
      raise ValueError(f'Perplexity every={every} must be 0 (only at the end) or more')
    self._loader, self._every, self.name = loader, every, name
    self._evaluator: Evaluator | None = None

  def due(self, step: int, *, last: bool) -> bool:
    """After the last update, and at multiples of `every`."""
    return last or (self._every > 0 and step % self._every == 0)

  def __call__(self, run: Run, step: int, train_state: Mapping[str, Any]) -> None:
    """Evaluates, records the metrics and, after the last update, writes evaluation.json."""
    if self._evaluator is None:
      self._evaluator = Evaluator(run.structure, self._loader)
    found = self._evaluator(step_lib.evaluation_params(train_state))
    run.write(step, {f'{self.name}/{key}': value for key, value in found.items()})
    run.message(f'{self.name} after update {step}: {_bits_per_byte(found)}, '
                f'loss {found["loss"]:.4f} nats per token, {found["tokens"]:,.0f} tokens')
    if jax.process_index() == 0:
      file = 'evaluation.json' if self.name == 'eval' else f'evaluation-{self.name}.json'
      write_json(os.path.join(run.workdir, file), {'step': step, **found, **_of(self._loader)})


def _of(loader: FiniteLoader) -> dict[str, Any]:
  """What was read, so that a report can tell held-out text from other text."""
  return {key: getattr(loader, key) for key in ('sources', 'split') if hasattr(loader, key)}


def _bits_per_byte(found: Mapping[str, float]) -> str:
  if 'bits_per_byte' in found:
    return f'{found["bits_per_byte"]:.4f} bits per byte'
  return ('bits per byte unknown (the store does not say how many bytes its targets are: prepare '
          'it again)')


def write_json(path: str, values: Mapping[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  with open(path + '.partial', 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=2)
    file.write('\n')
  os.replace(path + '.partial', path)


def evaluate(*, model: state_lib.Model, mesh: Mesh, rules: rules_lib.Rules, loader: FiniteLoader,
             checkpoint: str, workdir: str | None = None, step: int | None = None
             ) -> dict[str, float]:
  """Evaluates the weights of a checkpoint.

  Args:
    model: the model the weights belong to.
    mesh: any mesh; weights are placed on it whatever they were saved from.
    rules: logical axes to mesh axes.
    loader: held-out batches.
    checkpoint: directory of checkpoints.
    workdir: where to write evaluation.json; None writes nothing.
    step: which checkpoint; None takes the newest good one.
  Returns:
    See `Evaluator.__call__`.
  """
  provenance.check(checkpoint, loader=loader)
  structure = state_lib.describe(model, mesh, rules)
  params = checkpoints.load_params(checkpoint, structure.shapes, step=step, which='evaluated')
  began = time.monotonic()
  found = Evaluator(structure, loader)(params)
  print(f'{_bits_per_byte(found)}, loss {found["loss"]:.4f} nats per token, '
        f'perplexity {found["perplexity"]:.2f}, accuracy {found["accuracy"]:.4f} over '
        f'{found["tokens"]:,.0f} tokens in {time.monotonic() - began:.1f} s')
  if workdir is not None:
    os.makedirs(workdir, exist_ok=True)
    write_json(os.path.join(workdir, 'evaluation.json'), {**found, **_of(loader)})
  return found
