"""One trainer per folder: two would remove each other's checkpoints."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator

_NAME = '.train.lock'


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
  """Holds a folder while the body runs; the kernel lets go of it however this process ends.

  Args:
    folder: a local directory; made when missing.

  Raises:
    ValueError: another process holds it; the text names that process.
  """
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, _NAME)
  with open(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(f'{folder} is in use by {file.read().strip() or "another process"}, which '
                       f'trains there: wait for it, stop it, or choose another MODEL_DIR') from None
    except OSError as error:
      if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        raise
      print(f'note: the file system of {folder} has no locks ({error.strerror}): start only one '
            f'run there', file=sys.stderr)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield
    file.truncate(0)
