"""Names, checksums and manifests: how a checkpoint proves that it is whole and the right one."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1
_GOLDEN = 0x9E3779B9
_ODD = 0x85EBCA6B
_OFFSET = 0x27D4EB2F


class Damaged(Exception):
  """A checkpoint whose content differs from what was saved."""


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by readable path, such as `opt_state/1/mu/layers/mlp/up`.

  Args:
    tree: any pytree; None and empty nodes hold no leaves and are not named.

  Returns:
    Name to leaf, in the order of `jax.tree.leaves`.

  Raises:
    ValueError: a key contains '/', or two paths have the same name.
  """
  named = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    keys = [_key_text(key) for key in path]
    name = '/'.join(keys)
    if any('/' in key for key in keys):
      raise ValueError(f"state path {keys}: a key holds '/', which separates names; rename it")
    if name in named:
      raise ValueError(f'two leaves of the state are both named {name!r}; rename one of them')
    named[name] = leaf
  return named


def _key_text(key: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  raise ValueError(f'unknown kind of tree key: {key!r}')


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts from names with '/', the form in which tensors are stored."""
  tree: dict[str, Any] = {}
  for name, leaf in named.items():
    *parents, last = name.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def is_key(leaf: Any) -> bool:
  """Returns whether a leaf is a typed array of random keys, stored as its uint32 data."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns shape and dtype of each tensor as JSON-able values."""
  described = {}
  for name, leaf in named.items():
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise ValueError(
          f'state leaf {name!r} is of type {type(leaf).__name__}; allowed: arrays (or shapes with '
          'dtype). Wrap it, for example jnp.int32(value)')
    described[name] = {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
  return described


def _mix(x: jax.Array) -> jax.Array:
  """MurmurHash3's finaliser: each input bit flips each output bit half of the time."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def _words(x: jax.Array) -> jax.Array:
  """Bit patterns as uint32, one word per element (64-bit types: two, in a last dim)."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


@jax.jit
def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  words = _words(x)
  index, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for dim in reversed(range(words.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    index, stride = index + iota * np.uint32(stride % 2**32), stride * words.shape[dim]
  first = _mix(words + index * np.uint32(_GOLDEN))
  second = _mix(words ^ (index * np.uint32(_ODD) + np.uint32(_OFFSET)))
  return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def checksums(named: Mapping[str, jax.Array]) -> dict[str, str]:
  """Returns a 64-bit checksum per tensor that does not depend on how the tensor is sharded.

  Each element's bits are mixed with its global index and summed modulo 2**32, twice with different
  constants. Integer sums do not depend on their order, so every mesh gives the same number. It is
  computed where the tensor lives; only eight bytes per tensor reach the host.

  Args:
    named: tensors by name, any shape; 8 to 64-bit dtypes or bool.

  Returns:
    Name to 16 hexadecimal digits.
  """
  pairs = jax.device_get({name: _digest(leaf) for name, leaf in named.items()})
  return {name: sums_text((int(first), int(second))) for name, (first, second) in pairs.items()}


_BLOCKS = (1 << 20, 1 << 12)


@jax.jit
def _digest_piece(x: jax.Array, start: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
  words, place = _words(x), jax.lax.iota(jnp.uint32, x.shape[0])
  index, inside = start + place, place < count
  first = jnp.where(inside, _mix(words + index * np.uint32(_GOLDEN)), np.uint32(0))
  second = jnp.where(
      inside, _mix(words ^ (index * np.uint32(_ODD) + np.uint32(_OFFSET))), np.uint32(0))
  return (jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32),
          jnp.sum(inside & ~jnp.isfinite(x), dtype=jnp.int32))


class Pieces:
  """The checksum of a float tensor that is never in memory as a whole.

  Attributes:
    sums: the two sums so far; those of several `Pieces` of one tensor may be added.
    not_finite: NaN and infinite values so far.
  """

  def __init__(self, sums: tuple[int, int] = (0, 0)):
    self.sums, self.not_finite = sums, 0

  def add(self, piece: np.ndarray, start: int) -> None:
    """Adds a piece; each element once, in any order.

    Args:
      piece: contiguous, of a float dtype of 16 or 32 bits, any shape.
      start: index of its first element in the whole tensor, flattened.
    """
    flat, at = piece.reshape(-1), 0
    while at < flat.size:
      size = _BLOCKS[0] if flat.size - at >= _BLOCKS[0] // 16 else _BLOCKS[1]
      part = flat[at:at + size]
      count = part.size
      if count < size:
        part = np.concatenate([part, np.zeros(size - count, part.dtype)])
      found = _digest_piece(part, np.uint32((start + at) % 2**32), np.uint32(count))
      first, second, bad = (int(n) for n in jax.device_get(found))
      self.sums = ((self.sums[0] + first) % 2**32, (self.sums[1] + second) % 2**32)
      self.not_finite += bad
      at += count


def sums_text(sums: tuple[int, int]) -> str:
  """The two sums as the checksum a manifest holds."""
  return f'{sums[0]:08x}{sums[1]:08x}'


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a manifest with its own SHA-256, so that damage to the manifest is seen too.

  Raises:
    ValueError: the body is not JSON.
  """
  try:
    plain = json.loads(json.dumps(body, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(
        'extra must hold only JSON values (str, int, finite float, bool, None, list, dict): '
        f'{error}'
    ) from error
  return {'body': plain, 'sha256': _sha256(plain)}


def unseal(manifest: Any) -> dict[str, Any]:
  """Returns the body of a sealed manifest; raises Damaged where it was changed."""
  if not isinstance(manifest, dict) or set(manifest) != {'body', 'sha256'}:
    raise Damaged('its manifest is not one of ours')
  if _sha256(manifest['body']) != manifest['sha256']:
    raise Damaged('its manifest was changed after it was written (SHA-256 differs)')
  if manifest['body'].get('format') != FORMAT:
    raise ValueError(f"checkpoint format {manifest['body'].get('format')!r} is unknown; "
                     f'this version reads {FORMAT}')
  return manifest['body']


def _sha256(body: Any) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], *,
                casts: bool = False) -> list[str]:
  """Returns one line per tensor that differs between a checkpoint and the state it should fill.

  Args:
    saved: name to {'shape', 'dtype'} from the manifest.
    wanted: the same of the abstract state.
    casts: whether one float dtype may be read as another.
  """
  missing = [name for name in wanted if name not in saved]
  surplus = [name for name in saved if name not in wanted]
  lines = [f'missing in the checkpoint: {name} {_text(wanted[name])}{_nearest(name, surplus)}'
           for name in missing]
  lines += [f'only in the checkpoint: {name} {_text(saved[name])}{_nearest(name, missing)}'
            for name in surplus]
  for name in wanted:
    if name not in saved:
      continue
    a, b = saved[name], wanted[name]
    same_dtype = a['dtype'] == b['dtype'] or (casts and _is_float(a) and _is_float(b))
    if a['shape'] != b['shape'] or not same_dtype:
      lines.append(f'differs: {name} is {_text(a)} in the checkpoint, {_text(b)} in the model')
  return lines


def _text(tensor: Mapping[str, Any]) -> str:
  return f"{tensor['dtype']}{tensor['shape']}"


def _is_float(tensor: Mapping[str, Any]) -> bool:
  return 'float' in tensor['dtype']


def _nearest(name: str, names: list[str]) -> str:
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  return f' (nearest: {close[0]})' if close else ''
