"""Reading a warm token store: speed, the first batch far into a run, memory with many sources."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.bench import report as report_lib
from experiments.bench import stores
from t5x_like.data import loader as loader_lib
from t5x_like.data import objectives

FAR = 10 ** 9
_PACKINGS: tuple[objectives.Packing, ...] = ('concat', 'pack')
_SOURCE = 'bench'
_MEMORY = """
import json, sys
from experiments.bench import data
print(json.dumps(data.mixture_memory(sys.argv[1], batches=int(sys.argv[2]))))
"""


def measure(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'data'."""
  tokens, count = settings.scaled(20_000_000, 100_000), settings.scaled(200, 20)
  report.section('data', about=f'loader.batch() from a store of {tokens:,} tokens in documents of '
                               f'{stores.MEAN_TOKENS} on average')
  with tempfile.TemporaryDirectory(prefix='bench-') as folder:
    report.progress('writing a store')
    start = time.perf_counter()
    stores.write(folder, source=_SOURCE, tokens=tokens, vocab=settings.vocab)
    report.add('tokens/s written by one process', tokens / (time.perf_counter() - start),
               note='made-up ids: no tokenizer in this')
    for packing in _PACKINGS:
      _speed_rows(report, settings, folder, packing)
  with tempfile.TemporaryDirectory(prefix='bench-') as folder:
    each = settings.scaled(200_000, 2_000)
    report.progress(f'writing {count} stores')
    for number in range(count):
      stores.write(folder, source=f'source-{number:03d}', tokens=each, vocab=settings.vocab)
    _memory_rows(report, settings, folder, count=count, tokens=each)


def _speed_rows(report: report_lib.Report, settings: report_lib.Settings, folder: str,
                packing: objectives.Packing) -> None:
  report.progress(f'reading, {packing}')

  def opened(rows: int) -> loader_lib.Loader:
    return loader_lib.Loader(sources=_SOURCE, store_dir=folder, batch_size=rows,
                             length=settings.length, seed=0, packing=packing)

  start = time.perf_counter()
  loader = opened(settings.batch_size)
  loader.batch(0)
  report.add(f'{packing}: opening, first batch of step 0', 1e3 * (time.perf_counter() - start),
             'ms', note='computes the packing plan, then kept beside the store'
             if packing == 'pack' else '')
  times = []
  for number in range(settings.scaled(5, 2)):
    start = time.perf_counter()
    opened(settings.batch_size).batch(FAR + number)
    times.append(time.perf_counter() - start)
  report.add(f'{packing}: opening, first batch of step 10**9', 1e3 * statistics.median(times),
             'ms', note=f'median of {len(times)}')
  for rows in dict.fromkeys((settings.batch_size, settings.scaled(128, 16))):
    wall, core, fill = _rate(opened(rows), seconds=settings.scaled(30, 1) / 10)
    report.add(f'{packing}: tokens/s per core, {rows} rows', core,
               note=f'{wall:,.0f} by the clock; rows {100 * fill:.1f} % full')


def _rate(loader: loader_lib.Loader, *, seconds: float) -> tuple[float, float, float]:
  """Returns real tokens per second, per second of this thread's CPU time, and share of the row."""
  rows, length = loader.spec['targets'][0]
  for step in range(3):
    loader.batch(step)
  step, tokens = 3, 0.0
  start, cpu = time.perf_counter(), time.thread_time()
  while time.perf_counter() - start < seconds:
    tokens += float(loader.batch(step)['loss_weights'].sum())
    step += 1
  wall, core = time.perf_counter() - start, time.thread_time() - cpu
  return tokens / wall, tokens / core, tokens / ((step - 3) * rows * length)


def _memory_rows(report: report_lib.Report, settings: report_lib.Settings, folder: str, *,
                 count: int, tokens: int) -> None:
  report.progress(f'memory with {count} sources')
  done = subprocess.run([sys.executable, '-c', _MEMORY, folder, str(settings.scaled(500, 5))],
                        capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f'reading {count} sources failed:\n{done.stderr[-2000:]}')
  found: dict[str, Any] = json.loads(done.stdout)
  mebi = 2 ** 20
  report.add(f'RSS, {count} sources in one mixture', found['after'] / mebi, 'MiB',
             note=f'{tokens:,} tokens each; {found["batches"]} batches of {found["rows"]} rows; '
                  f'{found["files"] / mebi:.1f} MiB of it are pages of the stores')
  report.add('RSS before opening them', found['before'] / mebi, 'MiB')
  report.add('seconds to open them', found['open_seconds'], 's')


def mixture_memory(store_dir: str, *, batches: int) -> dict[str, float]:
  """Opens all stores of a folder as one mixture, reads from it, and tells this process's memory.

  Args:
    store_dir: folder of stores.
    batches: how many to read.

  Returns:
    'before' and 'after' (peak) resident bytes, 'files' of which mapped from files, beyond those
    mapped before; 'open_seconds', 'batches', 'rows'.
  """
  rows, before = 64, _memory()
  start = time.perf_counter()
  loader = loader_lib.Loader(sources=sorted(os.listdir(store_dir)), store_dir=store_dir,
                             batch_size=rows, length=512, seed=0)
  opening = time.perf_counter() - start
  for step in range(batches):
    loader.batch(step)
  after = _memory()
  return {'before': before['VmRSS'], 'after': after['VmHWM'], 'open_seconds': opening,
          'files': after['RssFile'] - before['RssFile'], 'batches': batches, 'rows': rows}


def _memory() -> dict[str, float]:
  with open('/proc/self/status', encoding='utf-8') as file:
    pairs = (line.split(':') for line in file)
    return {name: 1024.0 * int(value.split()[0]) for name, value in pairs
            if name.startswith(('VmHWM', 'VmRSS', 'Rss'))}
