"""Several processes of one run: how they find each other, and how one leaves the others.

Each process says who it is by its environment. Either in full, as `scripts/launch_local` does,

  T5X_LIKE_COORDINATOR=10.0.0.1:8476  T5X_LIKE_PROCESSES=4  T5X_LIKE_PROCESS_ID=0

or T5X_LIKE_CLUSTER=auto, where JAX knows the cluster: Slurm, Cloud TPU, GKE, Open MPI. Without any
of these a process is alone: it looks for no cluster and waits for nobody.
"""

import os
import sys
from collections.abc import Mapping

_COORDINATOR, _PROCESSES, _ID, _CLUSTER = (
  f'T5X_LIKE_{name}' for name in ('COORDINATOR', 'PROCESSES', 'PROCESS_ID', 'CLUSTER')
)


def settings(environ: Mapping[str, str]) -> dict[str, str | int] | None:
  """Reads the arguments of `jax.distributed.initialize` from an environment.

  Args:
    environ: such as `os.environ`; an empty value counts as none.

  Returns:
    {} where JAX shall detect the cluster; None for a process that is alone.

  Raises:
    ValueError: half of them are set, or a value is not what it has to be.
  """
  given = {name: environ.get(name, '') for name in (_COORDINATOR, _PROCESSES, _ID)}
  cluster = environ.get(_CLUSTER, '')
  if cluster not in ('', 'auto'):
    raise ValueError(f"{_CLUSTER}={cluster!r} is unknown; allowed: 'auto', or leave it unset")
  if not any(given.values()):
    return {} if cluster else None
  if cluster:
    raise ValueError(f'{_CLUSTER}=auto and {_named(given, present=True)} are both set; unset one')
  if not all(given.values()):
    raise ValueError(
      f'{_named(given, present=True)} needs {_named(given, present=False)} beside it; set all '
      f'three, as scripts/launch_local does, or none'
    )
  host, _, port = given[_COORDINATOR].rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(f'{_COORDINATOR}={given[_COORDINATOR]!r} must be host:port of process 0')
  for name in (_PROCESSES, _ID):
    if not given[name].isdecimal():
      raise ValueError(f'{name}={given[name]!r} must be a whole number')
  count, index = int(given[_PROCESSES]), int(given[_ID])
  if index >= count:
    raise ValueError(f'{_ID}={index} must be below {_PROCESSES}={count}: they count from 0')
  return {
    'coordinator_address': given[_COORDINATOR],
    'num_processes': count,
    'process_id': index,
  }


def _named(given: Mapping[str, str], *, present: bool) -> str:
  return ' and '.join(name for name, value in given.items() if bool(value) == present)


def initialize(environ: Mapping[str, str] | None = None) -> None:
  """Joins the other processes of the run, if the environment names any.

  Has to come before anything uses a device. A second call changes nothing.

  Args:
    environ: see `settings`; None takes the process's own.

  Raises:
    ValueError: the environment contradicts itself, or JAX detects no cluster where it should.
  """
  found = settings(os.environ if environ is None else environ)
  if found is None:
    return
  import jax  # Slow, and a process alone needs it later, or never.

  if jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(**found)  # pyright: ignore[reportArgumentType]
  except ValueError as error:
    raise ValueError(
      f'{_CLUSTER}=auto, but JAX detects no cluster here that it knows (Slurm, Cloud TPU, GKE, '
      f'Open MPI): {error} Unset it for a process alone, or set {_COORDINATOR}, {_PROCESSES} and '
      f'{_ID}'
    ) from None


def leave(status: int) -> int:
  """Ends a process that failed, without waiting for others that wait for it.

  JAX lets processes end together; those in the middle of a step never come to that point.

  Args:
    status: exit status of the process.

  Returns:
    The status, where the process is alone or did not fail.
  """
  if status and 'jax' in sys.modules:
    import jax

    if jax.distributed.is_initialized() and jax.process_count() > 1:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
  return status
