"""Files that may be compressed, and whose damage is named."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import zstandard

ENDINGS = ('.gz', '.zst')


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
  """Opens a file for reading bytes, unpacked if it is called .gz or .zst.

  Raises:
    ValueError: unreadable, damaged or truncated, also while it is read within the block.
  """
  try:
    with open(path, 'rb') as raw:
      if path.lower().endswith('.gz'):
        yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
      elif path.lower().endswith('.zst'):
        yield io.BufferedReader(_Zstandard(raw), 1 << 20)
      else:
        yield raw
  except gzip.BadGzipFile as error:
    raise ValueError(f'{path} is not a gzip file: {error}') from None
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from None
  except EOFError:
    raise ValueError(f'{path} is truncated: its gzip data ends too early') from None
  except (zlib.error, zstandard.ZstdError) as error:
    raise ValueError(f'{path} is damaged: {error}') from None


class _Zstandard(io.RawIOBase):
  """Frames one after the other, ending in an error rather than quietly if the last is cut short."""

  def __init__(self, raw: BinaryIO):
    self._raw, self._pending = raw, b''
    self._frame: Any = None  # The frame being read.

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._pending:
      ended = self._frame is None or self._frame.eof
      data = (self._frame.unused_data if self._frame and ended else b'') or self._raw.read(1 << 18)
      if not data:
        if not ended:
          raise zstandard.ZstdError('its zstandard data ends too early')
        return 0
      frame: Any = zstandard.ZstdDecompressor().decompressobj() if ended else self._frame
      self._frame, self._pending = frame, frame.decompress(data)
    count = min(len(buffer), len(self._pending))
    buffer[:count], self._pending = self._pending[:count], self._pending[count:]
    return count
