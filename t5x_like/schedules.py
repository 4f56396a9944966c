"""Learning rates as functions of the step: plain Python ints and traced values alike.

Step counts finished updates, so the first update of a run uses the rate of step 0 and the last one
that of `steps - 1`. Warm-up is linear and its last step, `warmup - 1`, uses the peak; no update is
wasted on a rate of zero. Past `steps` a schedule stays at its final rate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[int | jax.Array], jax.Array]


def constant(*, peak: float, warmup: int = 0) -> Schedule:
  """A linear warm-up, then the same rate for ever.

  Args:
    peak: learning rate, > 0.
    warmup: steps, >= 0.
  Returns:
    Step to learning rate, a float32 scalar.
  Raises:
    ValueError: a number is out of its range.
  """
  _check(peak=peak, warmup=warmup)
  return lambda step: _warm(step, warmup) * jnp.float32(peak)


def linear(*, peak: float, steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
  """A linear warm-up, then a straight line down to `final * peak` at `steps`.

  Args:
    peak: learning rate, > 0.
    steps: of the whole run, warm-up included.
    warmup: steps, at most `steps`.
    final: the last rate as a fraction of the peak, in [0, 1].
  Returns:
    Step to learning rate, a float32 scalar.
  Raises:
    ValueError: a number is out of its range.
  """
  _check(peak=peak, warmup=warmup, steps=steps, final=final)
  return _decayed(peak, warmup, warmup, steps, final, lambda part: 1.0 - part)


def cosine(*, peak: float, steps: int, warmup: int = 0, final: float = 0.1) -> Schedule:
  """A linear warm-up, then half a cosine down to `final * peak` at `steps` (arXiv:1608.03983).

  Args:
    peak: learning rate, > 0.
    steps: of the whole run, warm-up included.
    warmup: steps, at most `steps`.
    final: the last rate as a fraction of the peak, in [0, 1].
  Returns:
    Step to learning rate, a float32 scalar.
  Raises:
    ValueError: a number is out of its range.
  """
  _check(peak=peak, warmup=warmup, steps=steps, final=final)
  return _decayed(peak, warmup, warmup, steps, final,
                  lambda part: 0.5 * (1.0 + jnp.cos(jnp.pi * part)))


def rsqrt(*, peak: float, warmup: int) -> Schedule:
  """A linear warm-up, then peak * sqrt(warmup / step): no end needs to be known (arXiv:1706.03762).

  T5's `1 / sqrt(max(step, 10_000))` is peak=0.01, warmup=10_000, but for its flat first part.

  Args:
    peak: learning rate at the end of the warm-up, > 0.
    warmup: steps, >= 1; also the time scale of the decay.
  Returns:
    Step to learning rate, a float32 scalar.
  Raises:
    ValueError: a number is out of its range.
  """
  _check(peak=peak, warmup=warmup)
  if warmup < 1:
    raise ValueError(f'rsqrt: warmup={warmup}; allowed are integers from 1, the decay starts there')

  def rate(step: int | jax.Array) -> jax.Array:
    count = jnp.maximum(_float(step) + 1.0, warmup)
    return _warm(step, warmup) * jnp.float32(peak) * jnp.sqrt(warmup / count)

  return rate


def wsd(*, peak: float, steps: int, warmup: int = 0, decay: float = 0.2,
        final: float = 0.0) -> Schedule:
  """Warm-up, stable, then a (1 - sqrt) decay: Hägele et al. 2024, arXiv:2405.18392, equation 1.

  The checkpoint before the decay can be continued with a longer run; that is what it is for.

  Args:
    peak: learning rate, > 0.
    steps: of the whole run, warm-up and decay included.
    warmup: steps.
    decay: the last part of the run, as a fraction of `steps` in (0, 1].
    final: the last rate as a fraction of the peak, in [0, 1]; the paper's is 0.
  Returns:
    Step to learning rate, a float32 scalar.
  Raises:
    ValueError: a number is out of its range, or warm-up and decay overlap.
  """
  _check(peak=peak, warmup=warmup, steps=steps, final=final)
  if not 0 < decay <= 1:
    raise ValueError(f'wsd: decay={decay}; allowed are fractions in (0, 1] of the steps')
  start = steps - max(1, round(decay * steps))
  if start < warmup:
    raise ValueError(f'wsd: the decay would start at step {start}, within the warm-up of {warmup}; '
                     f'lower warmup or decay={decay}')
  return _decayed(peak, warmup, start, steps, final, lambda part: 1.0 - jnp.sqrt(part))


def as_schedule(learning_rate: float | Schedule) -> Schedule:
  """Returns a schedule for a number too."""
  if callable(learning_rate):
    return lambda step: jnp.asarray(learning_rate(step), jnp.float32)
  return constant(peak=learning_rate)


def _float(step: int | jax.Array) -> jax.Array:
  return jnp.asarray(step, jnp.float32)


def _warm(step: int | jax.Array, warmup: int) -> jax.Array:
  return jnp.minimum(1.0, (_float(step) + 1.0) / jnp.float32(max(1, warmup)))


def _decayed(peak: float, warmup: int, start: int, steps: int, final: float,
             shape: Callable[[jax.Array], jax.Array]) -> Schedule:
  """Warm-up, peak until `start`, then `shape` (from 1 at 0 to 0 at 1) down to `final`."""
  def rate(step: int | jax.Array) -> jax.Array:
    part = jnp.clip((_float(step) - start) / jnp.float32(max(1, steps - start)), 0.0, 1.0)
    return _warm(step, warmup) * jnp.float32(peak) * (final + (1.0 - final) * shape(part))

  return rate


def _check(*, peak: float, warmup: int, steps: int | None = None, final: float = 0.0) -> None:
  if not 0 < peak < float('inf'):
    raise ValueError(f'learning rate peak={peak}; allowed are finite numbers above 0')
  if warmup < 0:
    raise ValueError(f'warmup={warmup}; allowed are integers from 0')
  if steps is not None and steps < 1:
    raise ValueError(f'steps={steps}; allowed are integers from 1')
  if steps is not None and warmup > steps:
    raise ValueError(f'warmup={warmup} is longer than the whole run, steps={steps}; lower warmup')
  if not 0 <= final <= 1:
    raise ValueError(f'final={final}; allowed are fractions in [0, 1] of the peak')
