"""An append-only file of JSON lines that survives a kill, a torn last line and a full disk."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO


class Journal:
  """Appends JSON objects, one per line, each handed to the kernel as soon as it is written.

  What the kernel has accepted survives SIGKILL. A write the disk refuses is announced on stderr,
  kept, and tried again before the next one, so that no line is lost or torn and the run goes on.

  Args:
    path: file to append to; a torn last line (no newline) left by a kill is cut off.
  """

  def __init__(self, path: str):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _cut_torn_line(path)
    self.path = path
    self.last_error: OSError | None = None
    self._pending = b''
    self._fd: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

  def append(self, record: Mapping[str, Any]) -> None:
    """Appends one record.

    Args:
      record: JSON-able mapping without NaN or infinity, which JSON has no words for.

    Raises:
      ValueError: for a value JSON cannot hold, or after `close`.
    """
    if self._fd is None:
      raise ValueError(f'{self.path} is closed: nothing can be appended to it any more')
    self._pending += json.dumps(record, allow_nan=False, separators=(', ', ': ')).encode() + b'\n'
    self.flush()

  def flush(self) -> bool:
    """Hands everything pending to the kernel.

    Returns:
      True if nothing is left pending.
    """
    if self._fd is None:
      return not self._pending
    try:
      while self._pending:
        self._pending = self._pending[os.write(self._fd, self._pending):]
      self.last_error = None
    except OSError as error:
      if self.last_error is None:
        print(f'warning: cannot write to {self.path}: {error}; the lines are kept in memory and '
              'written as soon as the disk takes them', file=sys.stderr)
      self.last_error = error
    return not self._pending

  def close(self) -> None:
    """Writes what is pending if the disk takes it, and closes the file."""
    if self._fd is None:
      return
    if not self.flush():
      print(f'warning: {len(self._pending)} bytes never reached {self.path}: {self.last_error}',
            file=sys.stderr)
    os.close(self._fd)
    self._fd = None


def read(path: str) -> Iterator[dict[str, Any]]:
  """Yields the records of a journal.

  A torn last line is passed over; any other line that is not a JSON object is passed over with a
  warning that names it.

  Args:
    path: the file.

  Returns:
    An iterator over the records.
  """
  with open(path, 'rb') as file:
    for _, record in _records(file, path):
      yield record


def keep_only(path: str, keep: Callable[[dict[str, Any]], bool]) -> int:
  """Drops lines of a journal in one atomic step: readers see the old file or the new one.

  A torn last line goes too, and, with a warning that names it, any other line that is not a JSON
  object.

  Args:
    path: the file; it may be missing.
    keep: says for a record whether it stays.

  Returns:
    The number of whole records dropped.
  """
  if not os.path.exists(path):
    return 0
  size, kept = os.path.getsize(path), 0
  dropped = 0
  temporary = f'{path}.tmp'
  with open(path, 'rb') as old, open(temporary, 'wb') as new:
    for line, record in _records(old, path):
      if keep(record):
        kept += new.write(line)
      else:
        dropped += 1
    new.flush()
    os.fsync(new.fileno())
  if kept < size:
    os.replace(temporary, path)
  else:
    os.remove(temporary)
  return dropped


def _records(file: BinaryIO, path: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
  for number, line in enumerate(file, 1):
    if not line.endswith(b'\n'):
      return
    record = _parse(line)
    if record is None:
      print(f'warning: {path}, line {number} is not a JSON object and is passed over: '
            f'{line[:80]!r}', file=sys.stderr)
    else:
      yield line, record


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except ValueError:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors.
    return None
  return record if isinstance(record, dict) else None


def _cut_torn_line(path: str) -> None:
  if not os.path.exists(path):
    return
  with open(path, 'rb+') as file:
    end = size = file.seek(0, os.SEEK_END)
    while end:
      start = max(0, end - 65536)
      file.seek(start)
      newline = file.read(end - start).rfind(b'\n')
      if newline >= 0:
        end = start + newline + 1
        break
      end = start
    if end < size:
      file.truncate(end)
