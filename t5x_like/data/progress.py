"""Shows how far a preparation is: one moving line in a terminal, a line now and then in a log."""

import sys
import time
from typing import TextIO


class Progress:
  """Reports bytes done, MB/s, tokens and the time left.

  Args:
    label: what is being done.
    total: bytes of input.
    stream: default stderr.
    every: seconds between lines when the stream is no terminal.
  """

  def __init__(self, label: str, *, total: int, stream: TextIO | None = None, every: float = 5.0):
    self._label, self._total = label, total
    self._stream = sys.stderr if stream is None else stream
    self._terminal = self._stream.isatty()
    self._every = 0.1 if self._terminal else every
    self._begin = time.monotonic()
    self._next = self._begin + self._every
    self._kept = 0
    self._drawn = False

  def keep(self, done: int) -> None:
    """Notes bytes that were done before, which say nothing about the speed."""
    self._kept = done

  def update(self, done: int, tokens: int | None = None) -> None:
    """Draws if it is time to.

    Args:
      done: bytes of input done, kept ones included.
      tokens: tokens written, kept ones included; None where there are none.
    """
    now = time.monotonic()
    if now < self._next:
      return
    self._next = now + self._every
    self._drawn = True
    speed = (done - self._kept) / (now - self._begin)
    left = f'{duration((self._total - done) / speed)} left' if speed else 'starting'
    share = done / self._total if self._total else 1.0
    counted = '' if tokens is None else f'{tokens:,} tokens, '
    text = (f'{self._label}: {share:4.0%} {done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, '
            f'{speed / 1e6:.1f} MB/s, {counted}{left}')
    self._stream.write(f'\r\033[K{text}' if self._terminal else f'{text}\n')
    self._stream.flush()

  def close(self) -> None:
    """Clears the moving line."""
    if self._terminal and self._drawn:
      self._stream.write('\r\033[K')
      self._stream.flush()


def duration(seconds: float) -> str:
  """Returns seconds in words: 7 s, 3 min 05 s, 2 h 04 min."""
  seconds = int(seconds + 0.5)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60:02d} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'
