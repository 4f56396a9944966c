"""Shows a run before it is paid for: parameters, FLOPs, memory per device, data."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from t5x_like import step as step_lib
from t5x_like import tables
from t5x_like.state import Model, Structure


def write_model_info(structure: Structure, workdir: str) -> None:
  """Writes model-info.txt: every parameter with shape, axes, spec, dtype and count.

  Args:
    structure: the model's.
    workdir: the run's directory.
  """
  path = epath.Path(workdir) / 'model-info.txt'
  partial = epath.Path(f'{path}.partial')
  partial.write_text(tables.parameter_table(structure.rows()) + '\n')
  os.replace(partial, path) if '://' not in str(path) else partial.rename(path)


def memory_estimate(abstract: Mapping[str, Any], shapes: Mapping[str, Any], compiled: Any
                    ) -> dict[str, int]:
  """Bytes per device, by use.

  Args:
    abstract: the train state with shardings.
    shapes: the batch with shardings.
    compiled: the compiled step, whose own analysis gives the temporaries.
  Returns:
    Bytes for 'parameters', 'optimizer', 'batch', 'temporaries' (gradients and activations) and
    'total'. The train state is donated, so it counts once.
  """
  analysis = compiled.memory_analysis()
  kept = {'parameters': step_lib.memory_per_device(abstract['params']),
          'optimizer': step_lib.memory_per_device(abstract['opt_state']),
          'average': step_lib.memory_per_device(abstract.get('ema', {})),
          'batch': step_lib.memory_per_device(dict(shapes)),
          'temporaries': int(analysis.temp_size_in_bytes)}
  return {**kept, 'total': sum(kept.values())}


def show(structure: Structure, abstract: Mapping[str, Any], shapes: Mapping[str, Any],
         lower: Callable[[], Any], *, model: Model, loader: Any, steps: int) -> dict[str, Any]:
  """Prints the dry run; the step is compiled, but no parameter is allocated.

  Args:
    structure, abstract, shapes: the run's, without arrays.
    lower: lowers the train step.
    model: asked for its FLOPs per token, if it knows them.
    loader: asked to describe itself, if it can.
    steps: updates of the run.
  Returns:
    The numbers printed.
  """
  print(tables.parameter_table(structure.rows()))
  rows, length = next(iter(shapes.values())).shape[:2]
  tokens = rows * length
  info: dict[str, Any] = {'parameters': sum(row['count'] for row in structure.rows()),
                          'devices': structure.mesh.size, 'tokens_per_step': tokens,
                          'tokens': tokens * steps}
  print(f'\nmesh {dict(structure.mesh.shape)} on {structure.mesh.devices.flat[0].device_kind}; '
        f'{steps:,} steps x {rows} rows x {length} tokens = {tokens * steps:,} tokens')
  if hasattr(model, 'flops_per_token'):
    info['flops_per_token'] = model.flops_per_token(length)  # pyright: ignore
    print(f'FLOPs per token {info["flops_per_token"]:.4g}, per step '
          f'{info["flops_per_token"] * tokens:.4g}, whole run '
          f'{info["flops_per_token"] * tokens * steps:.4g}')
  info['memory'] = memory_estimate(abstract, shapes, lower().compile())
  described = ', '.join(f'{name} {size / 2**20:,.1f} MiB' for name, size in info['memory'].items()
                        if size)
  print(f'memory per device (estimate for {jax.default_backend()}): {described}')
  if hasattr(loader, 'describe'):
    info['data'] = loader.describe()
    print('data ' + json.dumps(info['data'], indent=2, default=str))
  return info
