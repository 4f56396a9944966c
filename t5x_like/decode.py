"""Sampling with a key/value cache: prefill once, then one token at a time inside one loop.

Letters: B batch, L prompt length, T new tokens, V vocab.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from partitioning import rules as rules_lib
from t5x_like import limits, prompts
from t5x_like import step as step_lib
from t5x_like.hooks import Run
from t5x_like.state import Structure

# How a decoder sees a prompt: each token those before it, or all of it, as a prefix LM.
Reading = Literal['causal', 'prefix']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: 0 is greedy; above, logits are divided by it.
    top_k: keep the k likeliest tokens; None keeps all.
    top_p: keep the smallest set of tokens whose probability reaches p (arXiv:1904.09751).
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f'Sampling.temperature={self.temperature} must be at least 0')
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'Sampling.top_k={self.top_k} must be at least 1 or None')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'Sampling.top_p={self.top_p} must be in (0, 1] or None')


def draw(logits: Float[Array, 'B V'], sampling: Sampling, key: Key[Array, '']) -> Int[Array, ' B']:
  """Draws one token per row.

  Args:
    logits: float32.
    sampling: temperature and truncation.
    key: ignored when greedy.
  Returns:
    int32 ids.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  if sampling.top_p is not None and sampling.top_p < 1:
    ordered = -jnp.sort(-logits, -1)
    before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
    smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return jax.random.categorical(key, logits, -1).astype(jnp.int32)


def _continue(module: Any, start: tuple[jax.Array, Any, jax.Array], *, key: jax.Array,
              new_tokens: int, sampling: Sampling, stop: Sequence[int]) -> Int[Array, 'B T']:
  """Draws tokens one after the other, from the last logits, the cache and the next positions."""
  batch = start[0].shape[0]
  ones = jnp.ones((batch, 1), jnp.int32)

  def one(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
    logits, cache, position, done = carry
    token = draw(logits, sampling, jax.random.fold_in(key, i))
    if stop:
      token = jnp.where(done, stop[0], token)
    for end in stop:
      done = done | (token == end)
    logits, cache = module.decode(token[:, None], cache, positions=position, segment_ids=ones)
    return (logits[:, -1], cache, position + 1, done), token

  begun = (*start, jnp.zeros((batch,), bool))
  return jax.lax.scan(one, begun, jnp.arange(new_tokens, dtype=jnp.int32))[1].T


def _check(prompts: Sequence[Sequence[int]], model: Any, *, new_tokens: int, seed: int) -> None:
  if not 0 <= seed < 1 << 32:
    raise ValueError(f'seed={seed} must be in [0, 2**32): others would draw as one of these')
  if new_tokens < 1 or not prompts or any(len(p) == 0 for p in prompts):
    raise ValueError('generation needs new_tokens >= 1 and at least one id in every prompt')
  vocab, largest = getattr(model, 'vocab', None), max(map(max, prompts))
  if vocab is not None and largest >= vocab:
    raise ValueError(f'a prompt has token id {largest}, but the model has vocab={vocab}: is the '
                     f'vocabulary the one it was trained with?')


def _stops(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
  return () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)


def _cut(drawn: jax.Array, stop: Sequence[int]) -> list[list[int]]:
  """Rows up to their first end of text."""
  rows = np.asarray(drawn).tolist()
  return [row[:min((i for i, token in enumerate(row) if token in stop), default=len(row))]
          for row in rows]


class Generator:
  """Generates continuations of prompts; one compilation per prompt and output length."""

  def __init__(self, structure: Structure, model: Any, *, sampling: Sampling,
               eos_id: int | Sequence[int] | None = None, reading: Reading = 'causal'):
    """Makes a generator.

    Args:
      structure: the model's.
      model: has `empty_cache(batch, length)`; its module has `decode`.
      sampling: how tokens are drawn.
      eos_id: rows stop after it, or any of several (the rest is filled with it); None never stops.
      reading: how prompts are seen: as the model was trained.
    """
    if reading not in get_args(Reading):
      raise ValueError(f"reading={reading!r} is unknown; allowed: 'causal', 'prefix'")
    self._structure, self._model, self._stop = structure, model, _stops(eos_id)
    self._sampling, self._reading = sampling, reading
    self._jitted = jax.jit(self._generate, static_argnames='new_tokens')

  def _generate(self, params: Any, prompts: Int[Array, 'B L'], segments: Int[Array, 'B L'],
                key: Key[Array, ''], *, new_tokens: int) -> Int[Array, 'B T']:
    module = self._structure.module(params)
    batch, length = prompts.shape
    cache = self._model.empty_cache(batch, length + new_tokens)
    positions = jnp.maximum(jnp.cumsum(segments, -1) - 1, 0)
    whole = {'prefix': segments} if self._reading == 'prefix' else {}
    logits, cache = module.decode(prompts, cache, positions=positions, segment_ids=segments,
                                  **whole)
    return _continue(module, (logits[:, -1], cache, positions[:, -1:] + 1), key=key,
                     new_tokens=new_tokens, sampling=self._sampling, stop=self._stop)

  def __call__(self, params: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int,
               seed: int = 0) -> list[list[int]]:
    """Generates.

    Args:
      params: nested dict of arrays.
      prompts: token ids per row, at least one each (the begin id stands for an empty prompt);
        shorter rows are padded on the left, which changes nothing.
      new_tokens: tokens to add to each row, at least 1.
      seed: of the draws, in [0, 2**32).
    Returns:
      The new ids per row, cut after the first end of text.
    Raises:
      ValueError: an empty prompt, no new token asked for, more than the model has positions for,
        or a seed out of range.
    """
    _check(prompts, self._model, new_tokens=new_tokens, seed=seed)
    longest = max(len(p) for p in prompts)
    limits.check(self._model, prompt=longest, new_tokens=new_tokens)
    ids = np.zeros((len(prompts), longest), np.int32)
    segments = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
      ids[row, longest - len(prompt):] = prompt
      segments[row, longest - len(prompt):] = 1
    with jax.set_mesh(self._structure.mesh), rules_lib.use(self._structure.rules):
      out = self._jitted(params, ids, segments, jax.random.key(seed), new_tokens=new_tokens)
    return _cut(out, self._stop)


class EncDecGenerator:
  """Writes about rows that an encoder reads once; one compilation per pair of lengths."""

  def __init__(self, structure: Structure, model: Any, *, sampling: Sampling, start_id: int,
               eos_id: int | Sequence[int] | None = None):
    """Makes a generator.

    Args:
      structure: the model's.
      model: has `empty_cache(batch, length)`; its module has `remember` and `decode`.
      sampling: how tokens are drawn.
      start_id: the decoder's first input.
      eos_id: rows stop after it, or any of several; None never stops.
    """
    self._structure, self._model, self._sampling = structure, model, sampling
    self._start, self._stop = start_id, _stops(eos_id)
    self._jitted = jax.jit(self._generate, static_argnames='new_tokens')

  def _generate(self, params: Any, read: Int[Array, 'B L'], segments: Int[Array, 'B L'],
                key: Key[Array, ''], *, new_tokens: int) -> Int[Array, 'B T']:
    module, batch = self._structure.module(params), read.shape[0]
    own = self._model.empty_cache(batch, 1 + new_tokens)
    cache = module.remember(read, own, segment_ids=segments)
    start = jnp.full((batch, 1), self._start, jnp.int32)
    zeros = jnp.zeros_like(start)
    logits, cache = module.decode(start, cache, positions=zeros, segment_ids=zeros + 1)
    return _continue(module, (logits[:, -1], cache, zeros + 1), key=key, new_tokens=new_tokens,
                     sampling=self._sampling, stop=self._stop)

  def __call__(self, params: Any, rows: Sequence[Sequence[int]], *, new_tokens: int,
               seed: int = 0) -> list[list[int]]:
    """Generates.

    Args:
      params: nested dict of arrays.
      rows: token ids the encoder reads, at least one each; shorter ones are padded, which changes
        nothing.
      new_tokens: tokens to write for each row, at least 1.
      seed: of the draws, in [0, 2**32).
    Returns:
      The new ids per row, cut after the first end of text.
    Raises:
      ValueError: an empty row, no new token asked for, or a seed out of range.
    """
    _check(rows, self._model, new_tokens=new_tokens, seed=seed)
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    segments = np.zeros_like(ids)
    for at, row in enumerate(rows):
      ids[at, :len(row)], segments[at, :len(row)] = row, 1
    with jax.set_mesh(self._structure.mesh), rules_lib.use(self._structure.rules):
      out = self._jitted(params, ids, segments, jax.random.key(seed), new_tokens=new_tokens)
    return _cut(out, self._stop)


class Writer:
  """Puts prompts into their frame and generates by whatever fits the model.

  Attributes:
    reads: whether an encoder reads the prompts, so that what is written does not continue them.
  """

  def __init__(self, structure: Structure, model: Any, *, sampling: Sampling,
               frame: prompts.Frame, reading: Reading = 'causal'):
    """Makes a writer.

    Args:
      structure: the model's.
      model: has `empty_cache`; its module has `decode`, and `remember` where it reads the prompt
        with an encoder.
      sampling: how tokens are drawn.
      frame: ids around a prompt.
      reading: how a decoder sees its prompt.
    Raises:
      ValueError: the model writes no text, or reads no prompt in the way asked for.
    """
    module = structure.module(structure.shapes)
    if not (hasattr(model, 'empty_cache') and hasattr(module, 'decode')):
      raise ValueError(f'{type(model).__name__} has no cache (empty_cache), so it writes no text: '
                       f'generate with a decoder or an encoder-decoder')
    self._frame, self.reads = frame, hasattr(module, 'remember')
    if self.reads and reading != 'causal':
      raise ValueError(f"reading={reading!r} is for decoders alone; {type(model).__name__} reads "
                       f"its prompt with an encoder: leave it 'causal'")
    self._run = (
        EncDecGenerator(structure, model, sampling=sampling, start_id=frame.start,
                        eos_id=frame.stop) if self.reads else
        Generator(structure, model, sampling=sampling, eos_id=frame.stop, reading=reading))

  def framed(self, ids: Sequence[int]) -> list[int]:
    """Returns what the model reads of a prompt's ids."""
    frame = self._frame
    if self.reads:
      return [*ids, *frame.after] or [frame.start]
    return [*frame.before, *ids] or [frame.begin]

  def __call__(self, params: Any, rows: Sequence[Sequence[int]], *, new_tokens: int, seed: int = 0
               ) -> list[list[int]]:
    """Generates; see the generators.

    Args:
      params: nested dict of arrays.
      rows: from `framed`.
      new_tokens: tokens to add to each row.
      seed: of the draws.
    """
    return self._run(params, rows, new_tokens=new_tokens, seed=seed)


class Samples:
  """A hook: prints and records continuations of prompts."""

  def __init__(self, *, prompts: Sequence[str] = ('',), every: int = 0, new_tokens: int = 64,
               sampling: Sampling | None = None, seed: int = 0, reading: Reading = 'causal'):
    """Makes the hook.

    Args:
      prompts: texts to continue; '' lets the model begin.
      every: updates between samples; 0 means only after the last.
      new_tokens: tokens to add; fewer where the model has no position for more.
      sampling: how tokens are drawn; None means temperature 0.8.
      seed: of the draws.
      reading: how a decoder sees its prompt: as it is trained.
    """
    if every < 0:
      raise ValueError(f'Samples every={every} must be 0 (only at the end) or more')
    self._prompts, self._every, self._new_tokens = list(prompts), every, new_tokens
    self._sampling, self._seed = sampling or Sampling(temperature=0.8), seed
    self._reading: Reading = reading
    self._writer: Writer | None = None

  def due(self, step: int, *, last: bool) -> bool:
    """After the last update, and at multiples of `every`."""
    return last or (self._every > 0 and step % self._every == 0)

  def check(self, *, model: Any, loader: Any) -> None:
    """Raises ValueError where the model or the data lack what sampling needs."""
    for part, name in ((model, 'empty_cache'), (loader, 'vocabulary'), (loader, 'bos_id')):
      if not hasattr(part, name):
        raise ValueError(f'decode.Samples needs {type(part).__name__}.{name}, which does not '
                         f'exist: add it, or leave @decode.Samples() out of HOOKS')

  def __call__(self, run: Run, step: int, train_state: Mapping[str, Any]) -> None:
    """Samples once per prompt, prints the texts and records them."""
    vocabulary = run.loader.vocabulary()
    if self._writer is None:
      begin = run.loader.bos_id
      self._writer = Writer(
          run.structure, run.model, sampling=self._sampling, reading=self._reading,
          frame=dataclasses.replace(prompts.of_training(vocabulary), before=(begin,), start=begin))
    framed = [self._writer.framed(vocabulary.encode(text)) for text in self._prompts]
    # Too few positions must not end a run that could still be saved.
    room = (limits.positions(run.model) or math.inf) - max(map(len, framed))
    if room < 1:
      run.message('no sample: a prompt takes all positions of the model')
      return
    rows = self._writer(step_lib.evaluation_params(train_state), framed,
                        new_tokens=int(min(self._new_tokens, room)), seed=self._seed)
    for text, row in zip(self._prompts, rows, strict=True):
      said = vocabulary.decode(row)
      run.write(step, {f'sample/{text[:32]}': said})
      run.message(f'--- sample after update {step} ---\n{text}{said}\n---')
