"""Our step and PyTorch's, one after the other on the same machine in the same minutes."""

import json
import os
import pathlib
import statistics
import subprocess
from typing import Any

import jax

from experiments.bench import machine, speed
from experiments.bench import report as report_lib

_SCRIPT = pathlib.Path(__file__).parent / 'torch_reference.py'
_TIMEOUT_SECONDS = 900


def measure(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'torch'."""
  report.section('torch', about='the same decoder in PyTorch, our step before and after it; '
                                'PyTorch attends over whole rows, ours within documents')
  if settings.torch_python is None:
    report.note('left out: give --torch_python, an interpreter that has torch')
    return
  reason = unusable(settings.torch_python)
  if reason:
    report.note(f'left out: {reason}')
    return
  for dtype in settings.dtypes:
    report.progress(f'ours in {dtype}')
    bare = speed.compiled(settings, dtype=dtype)
    problem = unlike(bare.parts.model.config)
    if problem:
      report.note(f'left out: the reference has no {problem}')
      return
    _rows(report, settings, bare, dtype)


def unusable(python: str) -> str | None:
  """Returns why an interpreter cannot run the reference, None if it can."""
  try:
    done = subprocess.run([python, '-c', 'import torch'], capture_output=True, text=True)
  except OSError as error:
    return f'{python} cannot be run: {error.strerror}'
  if done.returncode:
    return f'{python} has no torch: {(done.stderr.strip().splitlines() or ["it failed"])[-1]}'
  return None


def _rows(report: report_lib.Report, settings: report_lib.Settings, bare: speed.Bare, dtype: str
          ) -> None:
  short, steps = machine.SHORT[dtype], settings.scaled(30, 2)
  times = bare.each(steps)
  report.progress(f'PyTorch in {dtype}')
  theirs = run(settings, bare.parts.model.config, dtype=dtype, steps=2 * steps)
  times += bare.each(steps)
  tokens, ours = settings.batch_size * settings.length, statistics.median(times)
  report.add(f'{short} PyTorch step, median', 1e3 * theirs['median'], 'ms',
             note=f'torch {theirs["torch"]} on {theirs["device"]}, {theirs["how"]}; '
                  f'best {1e3 * min(theirs["times"]):.1f} ms of {len(theirs["times"])}')
  report.add(f'{short} PyTorch tokens/s', tokens / theirs['median'])
  report.add(f'{short} PyTorch matmul peak', theirs['peak'] / 1e9, 'GFLOP/s')
  report.add(f'{short} our step, median', 1e3 * ours, 'ms',
             note=f'before and after PyTorch; best {1e3 * min(times):.1f} ms of {len(times)}')
  report.add(f'{short} our tokens/s', tokens / ours)
  report.add(f'{short} our speed over PyTorch\'s', theirs['median'] / ours, 'x',
             note=f'median steps; best steps {min(theirs["times"]) / min(times):.2f} x')


def unlike(config: Any) -> str | None:
  """Returns what of a decoder's configuration the reference does not have, None if it has all."""
  wanted = {'mlp_form': 'gated', 'activation': 'silu', 'norm': 'rmsnorm', 'block': 'serial',
            'position': 'rope', 'rope_fraction': 1.0, 'rope_theta': 10000.0, 'biases': (),
            'dropout': 0.0, 'num_kv_heads': config.heads}
  wrong = [f'{name}={found!r}' for name, value in wanted.items()
           if (found := getattr(config, name)) != value]
  return ', '.join(wrong) or None


def run(settings: report_lib.Settings, config: Any, *, dtype: str, steps: int) -> dict[str, Any]:
  """Runs the reference in its interpreter, compiled, or eagerly where it cannot be compiled.

  Args:
    settings: batch and interpreter.
    config: the decoder's configuration.
    dtype: compute dtype.
    steps: to time.

  Returns:
    What `torch_reference.measure` returns, and 'how' it ran.

  Raises:
    RuntimeError: it failed both ways.
  """
  assert settings.torch_python is not None
  on_cpu = jax.default_backend() == 'cpu'
  request = {'embed': config.embed, 'layers': config.layers, 'heads': config.heads,
             'head_dim': config.width_of_head, 'mlp': config.mlp, 'vocab': config.vocab,
             'embeddings': config.embeddings, 'length': settings.length,
             'batch_size': settings.batch_size, 'dtype': dtype, 'steps': steps,
             'warmup': settings.scaled(5, 1), 'threads': len(os.sched_getaffinity(0)),
             'peak_dims': [1024, 2048] if on_cpu else [2048, 4096, 8192],
             'peak_seconds': 1.0 if settings.effort == 'full' else 0.05}
  failed = ''
  for how in ('torch.compile', 'eager'):
    if how == 'torch.compile' and settings.effort == 'quick':
      continue  # It takes a minute, to show nothing more.
    done = subprocess.run(
      [settings.torch_python, str(_SCRIPT)], capture_output=True, text=True,
      input=json.dumps({**request, 'compile': how == 'torch.compile'}), timeout=_TIMEOUT_SECONDS)
    if done.returncode == 0:
      suffix = f' ({failed})' if failed else ''
      return {**json.loads(done.stdout.splitlines()[-1]), 'how': how + suffix}
    failed = f'{how} failed: {(done.stderr.strip().splitlines() or ["?"])[-1]}'
  raise RuntimeError(f'PyTorch failed; {failed}')
