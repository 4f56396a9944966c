"""Held-out loss and bits per byte: a hook of training, and `python -m t5x_like.evaluate`."""

import sys

from t5x_like import config

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  sys.exit(config.run('t5x_like.evaluate.evaluate'))

import collections
import functools
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
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


# How often the likeliest token is right costs little here, and would cost each update.
NEXT_TOKEN = functools.partial(losses.next_token, accuracy='accuracy')


class Evaluator:
  """Sums a loss and its metrics over every batch of a finite loader; compiled once."""

  def __init__(self, structure: Structure, loader: FiniteLoader, loss: losses.Loss = NEXT_TOKEN):
    self._loader, self._structure, self._loss = loader, structure, loss
    self._shapes = step_lib.batch_shapes(loader.spec, structure)
    self._compiled: Any = None

  def _lower(self) -> Any:
    structure = self._structure

    def sums(params: Any, batch: Any) -> losses.Metrics:
      total, weight, metrics = self._loss(structure.module(params), batch, dropout_key=None)
      return {'loss': (total, weight), **metrics}

    with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
      return jax.jit(sums).lower(structure.shapes, self._shapes).compile()

  def __call__(self, params: Any) -> dict[str, float]:
    """Evaluates.

    Args:
      params: nested dict of arrays on the structure's mesh.
    Returns:
      'loss' (nats per token), 'perplexity', 'tokens' and what else the loss measures, such as
      'accuracy'; where the loader knows the bytes of the targets, 'bits_per_byte' and 'bytes'; and
      of a loader with `parts`, each measure of each part, as 'loss/span_0.15_3', the others being
      those of the parts in their shares.
    Raises:
      ValueError: the loader has no token to score.
    """
    if self._compiled is None:
      self._compiled = self._lower()
    shares: Mapping[str, float] = getattr(self._loader, 'parts', {}) or {'': 1.0}
    totals = {part: collections.defaultdict(lambda: np.zeros(2)) for part in shares}
    for i in range(len(self._loader)):
      batch = step_lib.place(self._loader, i, self._shapes)  # pyright: ignore
      part = self._loader.part(i) if len(shares) > 1 else next(iter(shares))  # pyright: ignore
      for name, pair in jax.device_get(self._compiled(params, batch)).items():
        totals[part][name] += np.array([float(x) for x in pair])
    return _measures(totals, shares, size=self._loader.bytes)


def _measures(totals: Mapping[str, Mapping[str, np.ndarray]], shares: Mapping[str, float], *,
              size: int | None) -> dict[str, float]:
  """Means of sums and weights by part and metric, and of the parts together."""
  tokens = sum(found['loss'][1] for found in totals.values())
  if tokens == 0:
    raise ValueError('the held-out data has no token to score')
  names = list(next(iter(totals.values())))
  together = {name: np.sum([share * totals[part][name] for part, share in shares.items()], 0)
              for name in names}
  means = {name: float(total / weight) for name, (total, weight) in together.items() if weight}
  found = {'loss': means['loss'], 'perplexity': math.exp(min(means['loss'], 700.0)), **means,
           'tokens': float(tokens)}
  if len(shares) > 1:
    found |= {f'{name}/{part}': float(total / weight) for part in shares
              for name, (total, weight) in totals[part].items() if weight}
  if size:
    nll = float(together['loss'][0])
    found |= {'bytes': size, 'bits_per_byte': nll / math.log(2) / size}
  return found


class Perplexity:
  """A hook: held-out loss and bits per byte every so many updates, and after the last."""

  def __init__(self, *, loader: FiniteLoader, every: int, name: str = 'eval',
               loss: losses.Loss = NEXT_TOKEN):
    """Makes the hook.

    Args:
      loader: held-out batches.
      every: updates between evaluations; 0 means only after the last.
      loss: what is measured; that of the training, where it is not the next token's.
      name: prefix of the metrics, and part of the file's name: evaluation-NAME.json for another
        than 'eval'. Each hook of a run needs its own.
    """
    if every < 0:
      raise ValueError(f'Perplexity every={every} must be 0 (only at the end) or more')
    self._loader, self._every, self.name, self._loss = loader, every, name, loss
    self._evaluator: Evaluator | None = None

  def due(self, step: int, *, last: bool) -> bool:
    """After the last update, and at multiples of `every`."""
    return last or (self._every > 0 and step % self._every == 0)

  def __call__(self, run: Run, step: int, train_state: Mapping[str, Any]) -> None:
    """Evaluates, records the metrics and, after the last update, writes evaluation.json."""
    if self._evaluator is None:
      self._evaluator = Evaluator(run.structure, self._loader, self._loss)
    found = self._evaluator(step_lib.evaluation_params(train_state))
    run.write(step, {f'{self.name}/{key}': value for key, value in found.items()})
    run.message(f'{self.name} after update {step}: {_said(found, self._loader)}')
    if jax.process_index() == 0:
      file = 'evaluation.json' if self.name == 'eval' else f'evaluation-{self.name}.json'
      write_json(os.path.join(run.workdir, file), {'step': step, **found, **_of(self._loader)})


def _of(loader: FiniteLoader) -> dict[str, Any]:
  """What was read, so that a report can tell held-out text from other text."""
  return {key: getattr(loader, key) for key in ('sources', 'split') if hasattr(loader, key)}


def _said(found: Mapping[str, float], loader: FiniteLoader) -> str:
  """The measures in words, those of parts in their order."""
  parts = [f'loss {found["loss"]:.4f} nats per token']
  if 'bits_per_byte' in found:
    parts.insert(0, f'{found["bits_per_byte"]:.4f} bits per byte')
  elif not getattr(loader, 'hides', False):
    parts.insert(0, 'bits per byte unknown (the store does not say how many bytes its targets '
                    'are: prepare it again)')
  told = ('loss', 'tokens', 'bytes', 'bits_per_byte')
  parts += [f'{name} {value:.4f}' for name, value in found.items() if name not in told]
  return ', '.join([*parts, f'{found["tokens"]:,.0f} tokens'])


def write_json(path: str, values: Mapping[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  with open(path + '.partial', 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=2)
    file.write('\n')
  os.replace(path + '.partial', path)


def evaluate(*, model: state_lib.Model, mesh: Mesh, rules: rules_lib.Rules, loader: FiniteLoader,
             checkpoint: str, workdir: str | None = None, step: int | None = None,
             loss: losses.Loss = NEXT_TOKEN) -> dict[str, float]:
  """Evaluates the weights of a checkpoint.

  Args:
    model: the model the weights belong to.
    mesh: any mesh; weights are placed on it whatever they were saved from.
    rules: logical axes to mesh axes.
    loader: held-out batches.
    checkpoint: directory of checkpoints.
    workdir: where to write evaluation.json; None writes nothing.
    step: which checkpoint; None takes the newest good one.
    loss: what is measured; that of the training, where it is not the next token's.
  Returns:
    See `Evaluator.__call__`.
  """
  provenance.check(checkpoint, loader=loader)
  structure = state_lib.describe(model, mesh, rules)
  step, params = checkpoints.load_weights(checkpoint, structure.shapes, step=step,
                                          which='evaluated')
  began = time.monotonic()
  found = Evaluator(structure, loader, loss)(params)
  print(f'step {step}: {_said(found, loader)} in {time.monotonic() - began:.1f} s')
  if workdir is not None:
    os.makedirs(workdir, exist_ok=True)
    write_json(os.path.join(workdir, 'evaluation.json'), {'step': step, **found, **_of(loader)})
  return found
