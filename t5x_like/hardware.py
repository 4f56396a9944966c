"""Peak speed of devices, and how much of it a training step uses (MFU)."""

import dataclasses
import functools
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

DType = Literal['bfloat16', 'float32']

_GOOGLE = 'https://cloud.google.com/tpu/docs/'
_NVIDIA = 'https://www.nvidia.com/en-us/data-center/'
# Dense TFLOP/s in bfloat16 per JAX device. Earlier rows win, so variants come before their family.
# NVIDIA's sheets state the sparse figure for Hopper and Blackwell: half of it is dense.
# A TPU7x chip (2,307 TFLOP/s) appears as two devices, one per chiplet.
_BF16_TFLOPS = (
  ('TPU v4 lite', 138.0, _GOOGLE + 'v4'),
  ('TPU v4', 275.0, _GOOGLE + 'v4'),
  ('TPU v5 lite', 197.0, _GOOGLE + 'v5e'),
  ('TPU v5e', 197.0, _GOOGLE + 'v5e'),
  ('TPU v5', 459.0, _GOOGLE + 'v5p'),
  ('TPU v6', 918.0, _GOOGLE + 'v6e'),
  ('TPU7x', 2307.0 / 2, _GOOGLE + 'tpu7x'),
  ('A100', 312.0, _NVIDIA + 'a100/'),
  ('H100 PCIe', 1513.0 / 2, _NVIDIA + 'h100/'),
  ('H100 NVL', 1671.0 / 2, _NVIDIA + 'h100/'),
  ('H100', 1979.0 / 2, _NVIDIA + 'h100/'),
  ('GH200', 1979.0 / 2, _NVIDIA + 'grace-hopper-superchip/'),
  ('H200 NVL', 1671.0 / 2, _NVIDIA + 'h200/'),
  ('H200', 1979.0 / 2, _NVIDIA + 'h200/'),
  ('B200', 4500.0 / 2, _NVIDIA + 'hgx/'),
)
_MEASURE_SECONDS = 0.4
# (rows, inner, columns): no one shape is the fastest on every CPU.
_CPU_MATMULS = ((1024, 1024, 1024), (2048, 1024, 256), (2048, 256, 256), (2048, 256, 1024))
_ACCELERATOR_MATMULS = ((4096, 4096, 4096), (8192, 8192, 8192))


@dataclasses.dataclass(frozen=True)
class Peak:
  """The most a device can compute.

  Attributes:
    flops: FLOP/s of one JAX device.
    device_kind: the device's name for itself.
    dtype: of the matrix products.
    source: where the figure is from: a URL, or how it was measured.
  """
  flops: float
  device_kind: str
  dtype: str
  source: str

  def __str__(self) -> str:
    return (f'{self.flops / 1e12:.4g} TFLOP/s {self.dtype} per device, '
            f'{self.device_kind} ({self.source})')


def table_flops(device_kind: str, *, dtype: DType = 'bfloat16') -> tuple[float, str] | None:
  """Looks a device up in the table of published peaks.

  float32 means JAX's default precision: one bfloat16 pass on a TPU, TF32 at half the bfloat16
  rate on a GPU.

  Args:
    device_kind: as in `jax.Device.device_kind`.
    dtype: of the matrix products.

  Returns:
    (FLOP/s of one JAX device, URL of the source), or None for a device not in the table.
  """
  for name, tflops, source in _BF16_TFLOPS:
    if name.lower() in device_kind.lower():
      share = 0.5 if dtype == 'float32' and not name.startswith('TPU') else 1.0
      return tflops * 1e12 * share, source
  return None


def peak_flops(device: Any = None, *, dtype: DType = 'bfloat16') -> Peak:
  """Finds the peak of a device: published where known, else measured once by a matrix product.

  Args:
    device: a `jax.Device`; default the first one of this process.
    dtype: of the matrix products.

  Returns:
    The peak of one JAX device.

  Raises:
    ValueError: for another dtype.
  """
  if dtype not in ('bfloat16', 'float32'):
    raise ValueError(f"no peak is known for dtype {dtype!r}; allowed: 'bfloat16', 'float32'")
  if device is None:
    device = jax.local_devices()[0]
  published = None if device.platform == 'cpu' else table_flops(device.device_kind, dtype=dtype)
  if published is not None:
    return Peak(published[0], device.device_kind, dtype, published[1])
  # The simulated devices of one CPU share its cores: only together do they reach what it can do.
  devices = tuple(jax.local_devices(backend='cpu')) if device.platform == 'cpu' else (device,)
  measured, how = _measured_flops(devices, dtype)
  return Peak(measured, device.device_kind, dtype, how)


@functools.cache
def _measured_flops(devices: tuple[Any, ...], dtype: str) -> tuple[float, str]:
  shapes = _CPU_MATMULS if devices[0].platform == 'cpu' else _ACCELERATOR_MATMULS
  mesh = jax.sharding.Mesh(np.array(devices), ('device',))
  seconds = _MEASURE_SECONDS / len(shapes)
  found = {shape: _matmul_flops(mesh, dtype, shape, seconds) for shape in shapes}
  best = max(found, key=lambda shape: found[shape])
  how = f'measured: best of {len(shapes)} matmuls, {" x ".join(map(str, best))}'
  if len(devices) > 1:
    how += f', on {len(devices)} simulated devices at once'
  return found[best], how


def _matmul_flops(mesh: jax.sharding.Mesh, dtype: str, shape: tuple[int, int, int],
                  seconds: float) -> float:
  rows, inner, columns = shape
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('device'))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  fastest = float('inf')
  # The caller may have set a mesh of other devices, which would refuse work on these.
  with jax.set_mesh(mesh):
    left = jax.device_put(np.full((rows * mesh.size, inner), 0.5, jnp.dtype(dtype)), split)
    right = jax.device_put(np.full((inner, columns), 0.5, jnp.dtype(dtype)), everywhere)
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
      product(left, right).block_until_ready()
      fastest = min(fastest, time.perf_counter() - start)
  return 2 * rows * inner * columns / fastest


def mfu(tokens_per_s: float, *, flops_per_token: float, peak: Peak | float, devices: int) -> float:
  """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B).

  Args:
    tokens_per_s: real tokens per second over all devices.
    flops_per_token: FLOPs the model needs for forward and backward of one token, without
      rematerialisation.
    peak: of one device, FLOP/s.
    devices: how many take part.

  Returns:
    A fraction, 1.0 being the peak.
  """
  flops = peak.flops if isinstance(peak, Peak) else peak
  return tokens_per_s * flops_per_token / (flops * devices)


def mfu_text(*, flops_per_token: float, peak: Peak, devices: int) -> str:
  """States the formula and the peak behind an MFU.

  Args:
    flops_per_token: as in `mfu`.
    peak: of one device.
    devices: how many take part.

  Returns:
    One line for logs and reports.
  """
  return (f'MFU = tokens/s x FLOPs/token / (devices x peak) = tokens/s x {flops_per_token:.4g} / '
          f'({devices} x {peak.flops:.4g}); peak: {peak}')
