"""Models in Hugging Face format in and out: seconds, MB/s, and the memory it takes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import report as report_lib
from models import config as config_lib
from models import decoder
from models.hf import family, files, table
from partitioning import mesh, rules
from t5x_like import checkpoints, state
from t5x_like.interchange import folder, importing, modelfile, safetensors

_SHARD = 500_000_000
_BLOCK = 1 << 20
# A child's own peak: what the kernel tells its parent begins with what the parent had at the fork.
_TOLD = """
import atexit, pathlib, runpy, sys
status, target = pathlib.Path('/proc/self/status'), pathlib.Path(sys.argv[1])
atexit.register(lambda: target.write_text(status.read_text()))
"""
# What any process of ours costs before it does anything.
_BASE = _TOLD + 'import jax, orbax.checkpoint, tensorstore; jax.numpy.zeros(1).block_until_ready()'
_CONVERT = _TOLD + """
sys.argv = sys.argv[1:]
runpy.run_module('t5x_like.convert', run_name='__main__', alter_sys=True)
"""


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


def train_state(path: str, config: config_lib.DecoderConfig) -> None:
  """Saves made-up float32 parameters as training does, and the model as a gin file beside them.

  Args:
    path: folder to make: checkpoints of step 1, and model.gin.
    config: their shape.
  """
  model = decoder.DecoderLM(config=config)
  structure = state.describe(model, mesh.make_mesh(devices=1), rules.data_parallel())
  block = np.random.default_rng(0).normal(size=_BLOCK).astype(np.float32)
  params = jax.tree.map(lambda x: jnp.asarray(np.resize(block, x.shape)), structure.shapes)
  with checkpoints.Checkpointer(path, every=1, mode='sync') as keeper:
    keeper.save(1, {'params': params}, extra={})
  with open(os.path.join(path, importing.MODEL_FILE), 'w', encoding='utf-8') as file:
    file.write(modelfile.text(model, about='A made-up Llama.'))


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
    base, _ = _run(_BASE)
    peak, seconds = _run(_CONVERT, 'import', theirs, f'--out={os.path.join(place, "ours")}')
  _add(report, 'import', [one.size for one in planned], base=base, peak=peak, seconds=seconds)


def measure_export(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'export'."""
  report.section('export', about='python -m t5x_like.convert export of a training checkpoint in '
                                 'float32')
  # Stacks of layers that are many times the largest tensor of a file.
  config = config_lib.DecoderConfig(
      vocab=settings.scaled(8192, 512), embed=settings.scaled(1024, 64),
      layers=settings.scaled(16, 2), heads=16, kv_heads=8, head_dim=settings.scaled(64, 4),
      mlp=settings.scaled(4096, 96))
  with tempfile.TemporaryDirectory(prefix='bench-') as place:
    report.progress('saving the checkpoint')
    ours, out = os.path.join(place, 'ours'), os.path.join(place, 'theirs')
    train_state(ours, config)
    report.progress('exporting it')
    base, _ = _run(_BASE)
    peak, seconds = _run(
        _CONVERT, 'export', ours, f'--out={out}', '--family=llama',
        f'--gin_file={os.path.join(ours, importing.MODEL_FILE)}', '--module=t5x_like.convert',
        '--gin.t5x_like.convert.export_model.model=%MODEL')
    sizes = [one.size for one in files.tensors(out).values()]
  _add(report, 'export', sizes, base=base, peak=peak, seconds=seconds)
  stack = config.layers * config.embed * config.mlp * 4
  report.add('largest parameter', stack / 1e6, 'MB', note='the stack of a matrix of all layers')


def _add(report: report_lib.Report, what: str, sizes: Sequence[int], *, base: float, peak: float,
         seconds: float) -> None:
  total, largest = sum(sizes), max(sizes)
  report.add('size', total / 1e6, 'MB', note=f'{len(sizes)} tensors')
  report.add('largest tensor', largest / 1e6, 'MB')
  report.add(f'{what}, launch to end', seconds, 's')
  report.add('speed', total / 1e6 / seconds, 'MB/s', note='launch, checksums and fsync included')
  report.add('peak RSS', peak / 1e6, 'MB')
  report.add('peak RSS above an idle process', (peak - base) / 1e6, 'MB',
             note=f'which has {base / 1e6:.0f} MB: JAX, Orbax, TensorStore')
  report.add('share of what is allowed', 100 * (peak - base) / (3 * largest + 300e6), '%',
             note='3 x the largest tensor + 300 MB')


def _run(code: str, *arguments: str) -> tuple[float, float]:
  """Runs code that begins with `_TOLD`; returns its peak resident bytes and its seconds."""
  with tempfile.NamedTemporaryFile('r') as told:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code, told.name, *arguments],
                          capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
      raise RuntimeError(f'{" ".join(arguments[:2])} failed:\n{done.stderr[-2000:]}')
    peak = next(line for line in told if line.startswith('VmHWM'))
  return 1024.0 * int(peak.split()[1]), seconds
