"""Launching the trainer: import, --help, the first update, and the memory of it all."""

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

_SOURCE = 'bench'
_POLL_SECONDS = 0.01
_TIMEOUT_SECONDS = 600
_IMPORT = """
import sys, time
start = time.perf_counter()
import t5x_like.train
seconds = time.perf_counter() - start
import json
heavy = [m for m in ('tensorflow', 'seqio', 'torch') if m in sys.modules]
print(json.dumps({'seconds': seconds, 'heavy': heavy}))
"""


def measure(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'startup'."""
  report.section('startup', about='fresh processes of python -m t5x_like.train')
  times = settings.scaled(3, 1)
  report.progress('import and --help')
  imports = [json.loads(_output([sys.executable, '-c', _IMPORT])) for _ in range(times)]
  report.add('import t5x_like.train', statistics.median(i['seconds'] for i in imports), 's',
             note=f'median of {times}')
  heavy = sorted({name for i in imports for name in i['heavy']})
  report.add('TensorFlow, seqio or PyTorch loaded by it', ', '.join(heavy) or 'no')
  helps = []
  for _ in range(times):
    start = time.perf_counter()
    _output([sys.executable, '-m', 't5x_like.train', '--help'])
    helps.append(time.perf_counter() - start)
  report.add('--help', statistics.median(helps), 's', note=f'median of {times}')
  with tempfile.TemporaryDirectory(prefix='bench-') as folder:
    tokens = settings.scaled(1_000_000, 20_000)
    stores.write(folder, source=_SOURCE, tokens=tokens, vocab=settings.vocab)
    stores.write(folder, source=_SOURCE, tokens=tokens // 50, vocab=settings.vocab,
                 split='validation')
    runs = []
    for number in range(times):
      report.progress(f'a run of a few updates from launch to end, {number + 1} of {times}')
      runs.append(_run(folder, os.path.join(folder, f'run-{number}'), settings))
  first, early, whole = (statistics.median(run[name] for run in runs)
                         for name in ('first', 'early', 'whole'))
  report.add('launch to first finished update', first, 's',
             note=f'median of {times}, compilation included; {settings.model} as in its gin file')
  report.add('TensorFlow or PyTorch loaded by a run', ', '.join(runs[0]['heavy']) or 'no',
             note='their libraries mapped by the process after its first update')
  report.add('peak RSS up to the first update', early / 2 ** 20, 'MiB')
  report.add('peak RSS of the whole run', whole / 2 ** 20, 'MiB',
             note='checkpoint, evaluation and samples included, as gin/runs/pretrain.gin has them')


def _output(command: list[str]) -> str:
  done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
  if done.returncode:
    raise RuntimeError(f'{" ".join(command[:3])} failed:\n{done.stderr[-2000:]}')
  return done.stdout


def _run(store_dir: str, workdir: str, settings: report_lib.Settings) -> dict[str, Any]:
  """Runs the trainer once.

  Returns:
    'first': seconds to the first finished update; 'early': peak bytes until then; 'whole': peak
    bytes of the run; 'heavy': which libraries it has mapped that it should not need.
  """
  values = {'MODEL_DIR': workdir, 'STORE_DIR': store_dir, 'SOURCES': _SOURCE}
  numbers = {'TRAIN_STEPS': 5, 'BATCH_SIZE': settings.batch_size, 'LENGTH': settings.length,
             'WARMUP_STEPS': 1}
  command = [sys.executable, '-m', 't5x_like.train', '--gin_file=gin/runs/pretrain.gin',
             f'--gin_file=gin/models/{settings.model}.gin',
             *(f'--gin.{name}="{value}"' for name, value in values.items()),
             *(f'--gin.{name}={value}' for name, value in numbers.items())]
  log = f'{workdir}.log'
  metrics = os.path.join(workdir, 'metrics.jsonl')
  with open(log, 'w', encoding='utf-8') as output:
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=output, stderr=output)
    found: dict[str, Any] = {}
    while True:
      pid, status, usage = os.wait4(child.pid, os.WNOHANG)
      if pid:
        child.returncode = os.waitstatus_to_exitcode(status)
        break
      if not found and _has_line(metrics):
        found = {'first': time.perf_counter() - start, 'early': _peak_rss(child.pid),
                 'heavy': _heavy(child.pid)}
      if time.perf_counter() - start > _TIMEOUT_SECONDS:
        child.kill()
      time.sleep(_POLL_SECONDS)
  if child.returncode or not found:
    with open(log, encoding='utf-8') as file:
      raise RuntimeError(f'the run ended with status {child.returncode}:\n{file.read()[-2000:]}')
  return {**found, 'whole': 1024.0 * usage.ru_maxrss}


def _has_line(path: str) -> bool:
  try:
    return os.path.getsize(path) > 0
  except OSError:
    return False


def _peak_rss(pid: int) -> float:
  with open(f'/proc/{pid}/status', encoding='utf-8') as file:
    return next(1024.0 * int(line.split()[1]) for line in file if line.startswith('VmHWM'))


def _heavy(pid: int) -> list[str]:
  with open(f'/proc/{pid}/maps', encoding='utf-8', errors='replace') as file:
    mapped = file.read()
  return [name for name in ('tensorflow', 'torch') if f'/{name}/' in mapped]
