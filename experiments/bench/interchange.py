"""Importing a model in Hugging Face format: seconds, MB/s, and the memory it takes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from experiments.bench import report as report_lib
from models import config as config_lib
from models import decoder
from models.hf import family, table
from partitioning import mesh, rules
from t5x_like import state
from t5x_like.interchange import folder, safetensors

_SHARD = 500_000_000
_BLOCK = 1 << 20
# What any process of ours costs before it does anything.
_BASE = 'import jax, orbax.checkpoint, tensorstore; jax.numpy.zeros(1).block_until_ready()'


def write(path: str, config: config_lib.DecoderConfig) -> list[safetensors.Planned]:
  """Writes a made-up Llama in bfloat16, in several files.

  Args:
    path: folder to make.
    config: its shape.
  Returns:
    Its tensors.
  """
  os.makedirs(path)
  llama = family.families()['llama']
  structure = state.describe(decoder.DecoderLM(config=config), mesh.make_mesh(devices=1),
                             rules.data_parallel())
  places = table.places(llama.rows(config), folder.leaves(structure))
  # As a published checkpoint has them: layer by layer.
  planned = [safetensors.Planned(place.theirs, 'BF16', place.shape)
             for place in sorted(places, key=lambda place: place.index)]
  safetensors.write(path, planned, _values(planned), shard_size=_SHARD)
  with open(os.path.join(path, folder.CONFIG), 'w', encoding='utf-8') as file:
    json.dump({'model_type': 'llama', **llama.write(config)}, file)
  return planned


def _values(planned: Sequence[safetensors.Planned]) -> Iterator[np.ndarray]:
  block = np.random.default_rng(0).normal(size=_BLOCK).astype(jnp.bfloat16)
  for one in planned:
    yield np.resize(block, one.shape)


def measure(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'import'."""
  report.section('import', about='python -m t5x_like.convert import of a made-up Llama in bfloat16')
  config = config_lib.DecoderConfig(
      vocab=settings.scaled(32000, 512), embed=settings.scaled(2048, 64),
      layers=settings.scaled(18, 2), heads=16, kv_heads=8, head_dim=settings.scaled(128, 4),
      mlp=settings.scaled(5632, 96))
  with tempfile.TemporaryDirectory(prefix='bench-') as place:
    report.progress('writing the model')
    theirs = os.path.join(place, 'theirs')
    planned = write(theirs, config)
    report.progress('importing it')
    base, _ = _run([sys.executable, '-c', _BASE])
    peak, seconds = _run([sys.executable, '-m', 't5x_like.convert', 'import', theirs,
                          f'--out={os.path.join(place, "ours")}'])
  total = sum(one.size for one in planned)
  largest = max(one.size for one in planned)
  report.add('size', total / 1e6, 'MB', note=f'{len(planned)} tensors in files of 500 MB')
  report.add('largest tensor', largest / 1e6, 'MB')
  report.add('import, launch to end', seconds, 's')
  report.add('speed', total / 1e6 / seconds, 'MB/s', note='launch, checksums and fsync included')
  report.add('peak RSS', peak / 1e6, 'MB')
  report.add('peak RSS above an idle process', (peak - base) / 1e6, 'MB',
             note=f'which has {base / 1e6:.0f} MB: JAX, Orbax, TensorStore')
  report.add('share of what is allowed', 100 * (peak - base) / (3 * largest + 300e6), '%',
             note='3 x the largest tensor + 300 MB')


def _run(command: list[str]) -> tuple[float, float]:
  """Runs a process; returns its peak resident bytes and its seconds."""
  with tempfile.TemporaryFile() as log:
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=log, stderr=log)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
      log.seek(0)
      raise RuntimeError(f'{" ".join(command[:4])} failed:\n{log.read()[-2000:].decode()}')
  return 1024.0 * usage.ru_maxrss, seconds
