"""Device meshes from a few numbers, the same on a laptop's simulated devices as on a pod."""

import math
from typing import Literal

import jax
from jax.sharding import AxisType, Mesh

AXES = ('data', 'fsdp', 'tensor')


def simulate_devices(count: int) -> None:
  """Makes the CPU backend present `count` devices; call before anything touches a device.

  Args:
    count: number of simulated CPU devices, at least 1.
  Raises:
    ValueError: `count` is not positive, or the backend already runs with another number.
  """
  if count < 1:
    raise ValueError(f'simulated devices must be at least 1, got {count}')
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError as error:
    if jax.device_count() != count:
      raise ValueError(
          f'cannot simulate {count} devices: the backend already runs with {jax.device_count()}; '
          f'set XLA_FLAGS=--xla_force_host_platform_device_count={count} before starting instead'
      ) from error


def resolve_shape(sizes: dict[str, int], device_count: int) -> dict[str, int]:
  """Replaces the one size of -1 by what is left of `device_count` and checks the product.

  Args:
    sizes: size per mesh axis; one may be -1.
    device_count: number of devices the mesh must cover exactly.
  Returns:
    The same axes with every size positive.
  Raises:
    ValueError: several sizes are -1, a size is 0 or below -1, or the product does not match.
  """
  free = [axis for axis, size in sizes.items() if size == -1]
  bad = {axis: size for axis, size in sizes.items() if size == 0 or size < -1}
  if bad:
    raise ValueError(f'mesh sizes must be positive or -1 (fill), got {bad}')
  if len(free) > 1:
    raise ValueError(f'only one mesh axis may be -1 (fill), got {free}')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  resolved = {axis: device_count // fixed if size == -1 else size for axis, size in sizes.items()}
  if math.prod(resolved.values()) != device_count:
    described = ' x '.join(f'{axis}={size}' for axis, size in sizes.items())
    raise ValueError(
        f'mesh {described} does not cover {device_count} devices; choose sizes whose product is '
        f'{device_count}, set one of them to -1, pass devices={fixed} to use only the first '
        f'{fixed}, or simulate them on CPU with simulated_devices={fixed}')
  return resolved


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: int | None = None,
              simulated_devices: int | None = None,
              mode: Literal['auto', 'explicit'] = 'auto') -> Mesh:
  """Builds the mesh ('data', 'fsdp', 'tensor') over this run's devices.

  Args:
    data: ways to split the batch with parameters replicated; -1 takes what is left.
    fsdp: ways to split the batch and the parameters (ZeRO-3).
    tensor: ways to split heads, mlp and vocabulary (Megatron).
    devices: use only the first so many devices; None uses all.
    simulated_devices: let the CPU present so many devices first.
    mode: 'auto' lets the partitioner propagate shardings; 'explicit' carries them in the types.
  Returns:
    A mesh whose layout is used exactly, on CPU as on an accelerator.
  Raises:
    ValueError: the sizes do not cover the devices.
  """
  if simulated_devices is not None:
    simulate_devices(simulated_devices)
  available = jax.devices()
  if devices is not None and not 1 <= devices <= len(available):
    raise ValueError(f'devices={devices} but {len(available)} are available')
  chosen = available[:devices]
  shape = resolve_shape({'data': data, 'fsdp': fsdp, 'tensor': tensor}, len(chosen))
  kind = AxisType.Explicit if mode == 'explicit' else AxisType.Auto
  return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(kind,) * len(AXES), devices=chosen)
