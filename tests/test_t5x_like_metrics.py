"""Metrics: what is logged reads back exactly, survives crashes, and speed is counted honestly."""

import io
import json
import math
import os
import pty
import re
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from t5x_like import hardware, journal, metrics, progress, tables


def lines(path):
  return path.read_text().splitlines()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats())
@settings(max_examples=200, deadline=None)
def test_floats_round_trip_exactly(tmp_path_factory, single, double):
  path = str(tmp_path_factory.mktemp('m') / 'metrics.jsonl')
  writer = metrics.Jsonl(path)
  writer.write(1, {'single': np.float32(single), 'double': double})
  writer.close()
  record, = metrics.read_jsonl(path)
  assert np.float32(record['single']) == np.float32(single)
  assert record['double'] == double or (math.isnan(record['double']) and math.isnan(double))


def test_plain_takes_every_scalar_and_refuses_arrays():
  assert metrics.plain(jnp.float32(0.1)) == 0.1
  assert metrics.plain(jnp.bfloat16(1.5)) == 1.5
  assert metrics.plain(np.int32(7)) == 7 and metrics.plain('text') == 'text'
  assert metrics.plain(np.float64(0.1)) == 0.1
  with pytest.raises(ValueError, match=r'one number or text, but this has shape \(2,\)'):
    metrics.plain(jnp.ones(2))


def test_nonfinite_values_are_valid_json(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  writer = metrics.Jsonl(str(path))
  writer.write(3, {'loss': float('nan'), 'grad': jnp.float32(-jnp.inf), 'ok': 1})
  writer.close()

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  record = json.loads(lines(path)[0], parse_constant=refuse)
  assert record == {'step': 3, 'loss': None, 'grad': None, 'ok': 1,
                    'nonfinite': {'loss': 'nan', 'grad': '-inf'}}
  back, = metrics.read_jsonl(str(path))
  assert math.isnan(back['loss']) and back['grad'] == -math.inf and 'nonfinite' not in back


def run(path, *, steps, start, evaluate=()):
  writer = metrics.Jsonl(str(path), step=start)
  for step in range(start + 1, steps + 1):
    writer.write(step, {'loss': np.float32(1 / step)})
    if step in evaluate:
      writer.write(step, {'eval/bits_per_byte': 2.0 / step})
  return writer


@pytest.mark.parametrize('crash', range(5, 10))
def test_a_crash_and_restart_leave_the_uninterrupted_file(tmp_path, crash):
  run(tmp_path / 'whole.jsonl', steps=12, start=0, evaluate=(5, 10)).close()
  broken = tmp_path / 'broken.jsonl'
  run(broken, steps=crash, start=0, evaluate=(5,)).close()
  with open(broken, 'ab') as file:
    file.write(b'{"step": 10, "lo')  # Torn by the kill.
  writer = metrics.Jsonl(str(broken), step=5)
  assert writer.dropped == crash - 5
  writer.write(5, {'eval/bits_per_byte': 2.0 / 5})  # The evaluation at the saved step runs again.
  for step in range(6, 13):
    writer.write(step, {'loss': np.float32(1 / step)})
    if step == 10:
      writer.write(step, {'eval/bits_per_byte': 2.0 / step})
  writer.close()
  assert broken.read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()
  assert os.listdir(tmp_path) in (['whole.jsonl', 'broken.jsonl'], ['broken.jsonl', 'whole.jsonl'])


def test_a_damaged_line_is_named_and_passed_over(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 2, "loss": 1.0}\n')
  assert [r['step'] for r in metrics.read_jsonl(str(path))] == [1, 2]
  assert f'{path}, line 2 is not a JSON object' in capsys.readouterr().err
  metrics.Jsonl(str(path), step=2).close()
  assert [json.loads(line)['step'] for line in lines(path)] == [1, 2]


def test_missing_metrics_are_a_clear_error(tmp_path):
  with pytest.raises(ValueError, match='there are no metrics at .*directory of a run that trained'):
    metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))


def test_a_full_disk_is_announced_and_loses_nothing(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  writer = metrics.Jsonl(str(path))
  writer.write(1, {'loss': 3.0})
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
  try:
    writer.write(2, {'loss': 2.0})
    writer.write(3, {'loss': 1.0})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert len(path.read_bytes().split(b'\n')) == 2
  assert capsys.readouterr().err.count('cannot write to') == 1
  writer.write(4, {'loss': 0.5})
  writer.close()
  assert [json.loads(line)['step'] for line in lines(path)] == [1, 2, 3, 4]


def test_closed_journal_refuses(tmp_path):
  writer = journal.Journal(str(tmp_path / 'j'))
  writer.close()
  writer.close()
  with pytest.raises(ValueError, match='is closed'):
    writer.append({'a': 1})


def test_only_the_first_process_writes(tmp_path):
  writer = metrics.open_writers(str(tmp_path), step=0, process_index=1)
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert os.listdir(tmp_path) == []


def events(directory):
  found = []
  for file in sorted(directory.iterdir()):
    data = file.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      found.append(Event.FromString(data[12:12 + size]))
      data = data[16 + size:]
  return found


def test_fanout_reaches_jsonl_and_tensorboard(tmp_path):
  writer = metrics.open_writers(str(tmp_path), step=0, process_index=0)
  writer.write(1, {'loss': jnp.float32(2.5), 'sample': 'once upon'})
  writer.flush()
  writer.close()
  assert json.loads(lines(tmp_path / 'metrics.jsonl')[0]) == {
    'step': 1, 'loss': 2.5, 'sample': 'once upon'}
  values = {v.tag: v for e in events(tmp_path / 'tensorboard') for v in e.summary.value}
  assert values['loss'].simple_value == 2.5
  assert any('once upon' in str(v.tensor) for tag, v in values.items() if 'sample' in tag)


def test_unknown_and_missing_writers_are_named(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"unknown metrics writer \['tensorbord'\]; allowed"):
    metrics.open_writers(str(tmp_path), step=0, process_index=0, kinds=('tensorbord',))
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match=r"'wandb', which is not installed.*t5x_like\[wandb\]"):
    metrics.open_writers(str(tmp_path), step=0, process_index=0, kinds=('wandb',))


def test_throughput_leaves_compilation_and_pauses_out():
  speed = metrics.Throughput(window=3)
  assert math.isnan(speed.tokens_per_second) and math.isnan(speed.step_seconds)
  speed.add(1, tokens=100, ready=60.0)  # A minute of compiling.
  for step in (2, 3):
    speed.add(step, tokens=100, ready=60.0 + (step - 1) * 0.5)
  assert speed.tokens_per_second == 200 and speed.step_seconds == 0.5
  speed.restart(at=500.0)  # An evaluation ended here.
  speed.add(4, tokens=100, ready=500.5)
  speed.restart()
  speed.add(5, tokens=100, ready=900.0)  # Compiled again.
  assert speed.mean_tokens_per_second == 200 and (speed.steps, speed.seconds) == (3, 1.5)
  with pytest.raises(ValueError, match='step 6 was ready 1 s before'):
    speed.add(6, tokens=100, ready=899.0)


@pytest.mark.parametrize('kind, dtype, tflops', [
  ('TPU v4', 'bfloat16', 275), ('TPU v5 lite', 'bfloat16', 197), ('TPU v5', 'float32', 459),
  ('TPU v5p', 'bfloat16', 459), ('TPU v6 lite', 'bfloat16', 918), ('TPU7x', 'bfloat16', 1153.5),
  ('NVIDIA A100-SXM4-80GB', 'bfloat16', 312), ('NVIDIA A100-SXM4-80GB', 'float32', 156),
  ('NVIDIA H100 80GB HBM3', 'bfloat16', 989.5), ('NVIDIA H100 PCIe', 'bfloat16', 756.5),
  ('NVIDIA H200', 'bfloat16', 989.5), ('NVIDIA GH200 480GB', 'bfloat16', 989.5),
  ('NVIDIA B200', 'bfloat16', 2250)])
def test_published_peaks(kind, dtype, tflops):
  found = hardware.table_flops(kind, dtype=dtype)
  assert found is not None and found[0] == tflops * 1e12 and found[1].startswith('https://')


def test_unknown_device_is_not_guessed():
  assert hardware.table_flops('NVIDIA GeForce RTX 3060') is None
  with pytest.raises(ValueError, match="dtype 'float16'; allowed: 'bfloat16', 'float32'"):
    hardware.peak_flops(dtype='float16')  # pyright: ignore[reportArgumentType]


def test_cpu_peak_is_measured_once_and_shared_by_simulated_devices():
  begin = time.perf_counter()
  peak = hardware.peak_flops(jax.devices('cpu')[0], dtype='float32')
  assert time.perf_counter() - begin < 10
  assert peak == hardware.peak_flops(jax.devices('cpu')[0], dtype='float32')
  assert 1e8 < peak.flops < 1e15 and 'measured' in peak.source
  shared = len(jax.local_devices(backend='cpu'))
  assert ('simulated' in peak.source) == (shared > 1)
  rate = 0.5 * shared * peak.flops / 1000
  assert hardware.mfu(rate, flops_per_token=1000, peak=peak, devices=shared) == pytest.approx(0.5)
  text = hardware.mfu_text(flops_per_token=1000, peak=peak, devices=shared)
  assert 'MFU = tokens/s x FLOPs/token / (devices x peak)' in text and 'measured' in text


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_peak_is_measured_under_any_mesh(kind):
  axis_type = getattr(jax.sharding.AxisType, kind)
  mesh = jax.make_mesh((len(jax.devices()),), ('data',), axis_types=(axis_type,))
  hardware._measured_flops.cache_clear()
  with jax.set_mesh(mesh):
    assert hardware.peak_flops(dtype='bfloat16').flops > 1e8


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_lines_are_throttled_but_first_and_last_always_come():
  stream, clock = io.StringIO(), Clock()
  with progress.Progress(100, mode='lines', every=10, stream=stream, clock=clock) as shown:
    for step in range(1, 98):
      shown.update(step, {'loss': 3.0, 'tokens_per_second': 12345.0, 'mfu': 0.412, 'lr': 1e-3})
      clock.now += 1.0
    shown.message('[evaluation] done')
  text = stream.getvalue().splitlines()
  steps = [int(re.findall(r'step (\d+)/100', line)[0]) for line in text if line[:4] == 'step']
  assert steps == [1, *range(11, 97, 10), 97]
  assert text[-2:][0] == '[evaluation] done'
  assert text[1] == ('step 11/100 (11.0 %)  loss 3.000  12.3k tokens/s  MFU 41.2 %  lr 0.001  '
                     'elapsed 0:00:10  ETA 0:01:29')


def test_time_left_counts_productive_time_only():
  clock, productive = Clock(), Clock()
  shown = progress.Progress(30, start=0, mode='lines', stream=io.StringIO(), clock=clock,
                            productive=productive)
  assert shown.seconds_left() is None
  for step in range(1, 11):
    clock.now += 500.0 if step in (1, 5) else 2.0  # Compilation, then an evaluation.
    productive.now += 2.0
    shown.update(step, {})
  assert shown.seconds_left() == 20 * 2.0


def test_an_update_costs_little():
  with progress.Progress(10 ** 9, mode='lines', stream=io.StringIO()) as shown:
    begin = time.perf_counter()
    for step in range(20_000):
      shown.update(step, {'loss': 1.0, 'mfu': 0.5})
    assert (time.perf_counter() - begin) / 20_000 < 50e-6


BAR = '''
import sys
from t5x_like import progress
with progress.Progress(40, start=10) as shown:
  for step in range(11, 41):
    shown.update(step, {'loss': 2.5, 'tokens_per_second': 5e4, 'mfu': 0.31})
  shown.message('[saved]')
  print('result')
assert shown.mode == 'off'
'''


def test_a_terminal_gets_a_bar_and_stdout_stays_clean():
  leader, follower = pty.openpty()
  done = subprocess.run([sys.executable, '-c', BAR], stdout=subprocess.PIPE, stderr=follower,
                        env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '80'}, timeout=60)
  os.close(follower)
  shown = b''
  try:
    while chunk := os.read(leader, 65536):
      shown += chunk
  except OSError:  # The terminal's other end is closed.
    pass
  os.close(leader)
  text = shown.decode()
  assert done.returncode == 0, text
  assert done.stdout == b'result\n'
  plain = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', text)
  assert '40/40' in plain and '\u2501' in plain and '[saved]' in plain
  assert 'loss 2.500 50.0k tok/s MFU 31.0 %' in plain


def test_unknown_progress_mode():
  with pytest.raises(ValueError, match="unknown progress mode 'fancy'; allowed: 'auto', 'bar'"):
    progress.Progress(1, mode='fancy')  # pyright: ignore[reportArgumentType]


def test_parameter_table():
  table = tables.parameter_table([
    {'path': 'decoder/embed', 'shape': (512, 256), 'axes': ('vocab', 'embed'),
     'spec': "P('tensor', None)", 'dtype': jnp.float32},
    {'path': 'decoder/scale', 'shape': (256,), 'axes': None, 'spec': 'P()',
     'dtype': jnp.dtype('bfloat16'), 'count': 256}])
  rows = table.splitlines()
  assert rows[0].split() == ['path', 'shape', 'logical', 'axes', 'spec', 'dtype', 'count']
  assert rows[2].endswith('131,072') and 'vocab, embed' in rows[2] and '512 x 256' in rows[2]
  assert 'bfloat16' in rows[3] and rows[-1].endswith('131,328')
  assert 'total: 2 parameter arrays' in rows[-1] and '512.5 KiB' in rows[-1]
  assert len({len(row) for row in rows}) == 1


def test_texts_for_people():
  assert [tables.count_text(n) for n in (7, 999.9, 12345, 1e6, 2.5e12)] == [
    '7', '1k', '12.3k', '1M', '2.5T']
  assert tables.duration_text(125.4) == '0:02:05'
  assert tables.duration_text(90000) == '1 d 1:00:00'
  assert tables.bytes_text(13.2 * 2 ** 20) == '13.2 MiB'
  with pytest.raises(ValueError, match='1 columns in .* under the 2'):
    tables.text_table(('a', 'b'), [['x']], align='ll')
