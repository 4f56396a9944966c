"""What the benchmark runs on, and how fast that machine multiplies matrices."""

import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import report as report_lib
from t5x_like import hardware

Shape = tuple[int, int, int]
SHORT = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16'}


def measure(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows that say what machine this is."""
  del settings
  report.section('machine', about='what the numbers below were measured on')
  report.add('jax', jax.__version__)
  report.add('python', platform.python_version())
  report.add('CPU', cpu_model())
  report.add('cores this process may use', len(os.sched_getaffinity(0)))
  report.add('device', f'{len(jax.local_devices())} x {jax.local_devices()[0].device_kind}')
  report.add('load average of the last minute', os.getloadavg()[0],
             note='other work slows every number below')


def cpu_model() -> str:
  """Returns the processor's name for itself."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()


def model_shapes(config: Any, *, tokens: int) -> list[Shape]:
  """Returns the matrix products of a decoder's forward pass as (rows, inner, columns).

  Args:
    config: a `models.config.DecoderConfig`.
    tokens: of a batch.
  """
  heads = config.heads * config.width_of_head
  pairs = [(config.embed, heads), (heads, config.embed), (config.embed, config.mlp),
           (config.mlp, config.embed), (config.embed, config.vocab)]
  return [(tokens, *pair) for pair in dict.fromkeys(pairs)]


def matmul_peak(dtype: str, *, shapes: list[Shape], seconds: float) -> tuple[float, Shape]:
  """Measures the fastest matrix product under JAX.

  Args:
    dtype: of the operands and the result.
    shapes: candidates, (rows, inner, columns).
    seconds: spent on each.

  Returns:
    FLOP/s of the best product seen, and its shape.
  """
  best, best_shape = 0.0, shapes[0]
  product = jax.jit(jnp.matmul)
  for rows, inner, columns in shapes:
    left = jax.device_put(np.full((rows, inner), 0.5, jnp.dtype(dtype)))
    right = jax.device_put(np.full((inner, columns), 0.5, jnp.dtype(dtype)))
    product(left, right).block_until_ready()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
      product(left, right).block_until_ready()
      flops = 2 * rows * inner * columns / (time.perf_counter() - start)
      if flops > best:
        best, best_shape = flops, (rows, inner, columns)
  return best, best_shape


def add_peak(report: report_lib.Report, settings: report_lib.Settings, *, dtype: str, config: Any,
             when: str) -> float:
  """Measures this machine's matmul peak, adds its row and returns it in FLOP/s.

  Args:
    report: gets the row.
    settings: effort and batch.
    dtype: of the matrix products.
    config: the model whose own shapes are tried too.
    when: ends the row's name: a machine's speed drifts, so it is measured more than once.
  """
  dims = [1024, 2048] if jax.default_backend() == 'cpu' else [2048, 4096, 8192]
  shapes = [(dim, dim, dim) for dim in dims[:settings.scaled(len(dims), 1)]]
  shapes += model_shapes(config, tokens=settings.batch_size * settings.length)
  seconds = 1.0 if settings.effort == 'full' else 0.05
  report.progress(f'matmul peak in {dtype}')
  peak, shape = matmul_peak(dtype, shapes=shapes, seconds=seconds)
  report.add(f'{SHORT[dtype]} matmul peak {when}', peak / 1e9, 'GFLOP/s',
             note=f'best of {len(shapes)} shapes: {" x ".join(map(str, shape))}')
  published = hardware.table_flops(jax.local_devices()[0].device_kind, dtype=_table(dtype))
  if published is not None and report.find('step', f'{SHORT[dtype]} published peak') is None:
    report.add(f'{SHORT[dtype]} published peak', published[0] / 1e9, 'GFLOP/s', note=published[1])
  return peak


def _table(dtype: str) -> hardware.DType:
  return 'float32' if dtype == 'float32' else 'bfloat16'
