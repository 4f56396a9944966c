"""Optimizers: optax's, with one table of parameter roles and a learning rate that logs can trust.

Each function returns an `Optimizer`: an `optax.GradientTransformation` that also knows the schedule
it applies. All decay weights decoupled and scaled by the learning rate, as in torch: an update is
-rate * (direction + weight_decay * parameter).
"""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import optax
from optax import contrib

from t5x_like import schedules

Role = Literal['matrix', 'head', 'embedding', 'vector']
Rules = Sequence[tuple[str, Role]]

# What a parameter is, by its path and not by its rank: a bias stacked over layers has two dims.
ROLES: Rules = (
    (r'(^|/)(scale|(head_)?bias)$', 'vector'),
    (r'(^|/)embedding$', 'embedding'),
    (r'(^|/)head/kernel$', 'head'),
    (r'(^|/)kernel$', 'matrix'),
)
# How many dims of a kernel are summed over, not counting stacks of layers or experts.
INPUT_DIMS = ((r'(^|/)(attention|cross)/out/kernel$', 2), (r'', 1))
_STACKED = re.compile(r'(^|/)layers/(?!\d+(/|$))')
# A mixture of experts has one such kernel per expert, stacked after the layers.
_EXPERTS = re.compile(r'(^|/)mlp/(gate|up|down)/kernel$')


class Optimizer(optax.GradientTransformation):
  """An optax transformation that names the learning rate it applies.

  Attributes:
    init: parameters to optimizer state.
    update: (gradients, state, parameters) to (updates, state).
    learning_rate: finished updates to the rate of the next one; exactly the function applied.
  """

  learning_rate: schedules.Schedule

  def __new__(cls, init: Callable, update: Callable, learning_rate: schedules.Schedule):
    self = super().__new__(cls, init, update)
    self.learning_rate = learning_rate
    return self


def adamw(*, learning_rate: float | schedules.Schedule, b1: float = 0.9, b2: float = 0.95,
          eps: float = 1e-8, weight_decay: float = 0.1, clip_norm: float | None = 1.0,
          decay: Sequence[Role] = ('matrix', 'head'), roles: Rules = ()) -> Optimizer:
  """AdamW (arXiv:1711.05101).

  Args:
    learning_rate: number or schedule.
    b1: decay of the mean of gradients.
    b2: decay of the mean of squared gradients.
    eps: added to the denominator.
    weight_decay: times the learning rate, per step.
    clip_norm: gradients are scaled down to this global norm; None: never.
    decay: roles whose parameters decay.
    roles: (regex on the path, role) that go before `ROLES`.
  Returns:
    The optimizer.
  Raises:
    ValueError: a setting is out of range; at init: a regex without a match, or a parameter
      without a role.
  """
  return _optimizer([optax.scale_by_adam(b1=b1, b2=b2, eps=eps)], learning_rate=learning_rate,
                    weight_decay=weight_decay, clip_norm=clip_norm, decay=decay, roles=roles)


def lion(*, learning_rate: float | schedules.Schedule, b1: float = 0.9, b2: float = 0.99,
         weight_decay: float = 0.3, clip_norm: float | None = 1.0,
         decay: Sequence[Role] = ('matrix', 'head'), roles: Rules = ()) -> Optimizer:
  """Lion (arXiv:2302.06675): the sign of an interpolated momentum.

  Its learning rate is 3 to 10 times smaller than AdamW's, its weight decay as much larger.

  Args:
    learning_rate: number or schedule.
    b1: interpolation between momentum and gradient in the update.
    b2: decay of the momentum.
    weight_decay: times the learning rate, per step.
    clip_norm: gradients are scaled down to this global norm; None: never.
    decay: roles whose parameters decay.
    roles: (regex on the path, role) that go before `ROLES`.
  Returns:
    The optimizer.
  Raises:
    ValueError: as `adamw`.
  """
  return _optimizer([optax.scale_by_lion(b1=b1, b2=b2)], learning_rate=learning_rate,
                    weight_decay=weight_decay, clip_norm=clip_norm, decay=decay, roles=roles)


def adafactor(*, learning_rate: float | schedules.Schedule, decay_rate: float = 0.8,
              update_clip: float = 1.0, momentum: float | None = None,
              step_size: Literal['relative', 'absolute'] = 'relative',
              min_factored_dim: int = 128, weight_decay: float = 0.0,
              clip_norm: float | None = None, decay: Sequence[Role] = ('matrix', 'head'),
              roles: Rules = ()) -> Optimizer:
  """Adafactor (arXiv:1804.04235): second moments kept as row and column means.

  Statistics over a whole tensor (update clipping, relative step size) take a stack of layers as
  one tensor. Weight decay is scaled by the learning rate, unlike in `optax.adafactor`.

  Args:
    learning_rate: number or schedule; T5's is rsqrt with peak 0.01 and warmup 10_000.
    decay_rate: exponent of the second moments' decay, 1 - step ** -decay_rate.
    update_clip: largest root mean square of a tensor's update, before the learning rate.
    momentum: decay of a mean of updates; None: no momentum and no memory for it.
    step_size: 'relative' multiplies by the root mean square of the parameter.
    min_factored_dim: dims below this are not factored.
    weight_decay: times the learning rate, per step.
    clip_norm: gradients are scaled down to this global norm; None: never.
    decay: roles whose parameters decay.
    roles: (regex on the path, role) that go before `ROLES`.
  Returns:
    The optimizer.
  Raises:
    ValueError: as `adamw`.
  """
  if step_size not in ('relative', 'absolute'):
    raise ValueError(f"adafactor: step_size={step_size!r}; allowed are 'relative' and 'absolute'")
  parts = [optax.scale_by_factored_rms(decay_rate=decay_rate,
                                       min_dim_size_to_factor=min_factored_dim),
           optax.clip_by_block_rms(update_clip)]
  if step_size == 'relative':
    parts.append(optax.scale_by_param_block_rms())
  if momentum is not None:
    parts.append(optax.ema(momentum, debias=False))
  return _optimizer(parts, learning_rate=learning_rate, weight_decay=weight_decay,
                    clip_norm=clip_norm, decay=decay, roles=roles)


def sgd(*, learning_rate: float | schedules.Schedule, momentum: float | None = 0.9,
        weight_decay: float = 0.0, clip_norm: float | None = 1.0,
        decay: Sequence[Role] = ('matrix', 'head'), roles: Rules = ()) -> Optimizer:
  """Stochastic gradient descent with heavy-ball momentum.

  Args:
    learning_rate: number or schedule.
    momentum: decay of the sum of gradients; None: no momentum.
    weight_decay: times the learning rate, per step.
    clip_norm: gradients are scaled down to this global norm; None: never.
    decay: roles whose parameters decay.
    roles: (regex on the path, role) that go before `ROLES`.
  Returns:
    The optimizer.
  Raises:
    ValueError: as `adamw`.
  """
  parts = [] if momentum is None else [optax.trace(decay=momentum)]
  return _optimizer(parts, learning_rate=learning_rate, weight_decay=weight_decay,
                    clip_norm=clip_norm, decay=decay, roles=roles)


def muon(*, learning_rate: float | schedules.Schedule, beta: float = 0.95, newton_steps: int = 5,
         rms: float = 0.2, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
         weight_decay: float = 0.1, clip_norm: float | None = 1.0,
         decay: Sequence[Role] = ('matrix', 'head'), roles: Rules = (),
         input_dims: Sequence[tuple[str, int]] = ()) -> Optimizer:
  """Muon (Jordan 2024) on matrices, Adam on everything else.

  The momentum of each matrix is orthogonalised by Newton-Schulz steps. A kernel of higher rank,
  such as [embed, heads, head_dim], is taken as the matrix inputs x outputs; each layer of a stack
  on its own. Updates are scaled to Adam's usual size, rms * sqrt(max(inputs, outputs)), so that
  AdamW's learning rate and decay carry over (arXiv:2502.16982, equation 4).

  Args:
    learning_rate: number or schedule, for matrices and the rest.
    beta: decay of the matrices' momentum (Nesterov).
    newton_steps: iterations.
    rms: root mean square of a matrix's update.
    b1: Adam's, for the rest.
    b2: Adam's, for the rest.
    eps: Adam's, for the rest.
    weight_decay: times the learning rate, per step.
    clip_norm: gradients are scaled down to this global norm; None: never.
    decay: roles whose parameters decay.
    roles: (regex on the path, role) that go before `ROLES`; role 'matrix' is optimised by Muon.
    input_dims: (regex on the path, count of leading input dims) that go before `INPUT_DIMS`.
  Returns:
    The optimizer.
  Raises:
    ValueError: as `adamw`; also a matrix without input or output dims.
  """
  inputs = (*input_dims, *INPUT_DIMS)

  def dims(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: _dims(_name(path), x, inputs), params)

  def scaled(updates: Any, params: Any = None) -> Any:
    del params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * (rms * _longer_side(x, _dims(_name(path), x, inputs)) ** 0.5), updates)

  def labels(params: Any) -> Any:
    _check_matches([pattern for pattern, _ in input_dims], _paths(params), 'input_dims')
    return jax.tree.map(lambda role: 'muon' if role == 'matrix' else 'adam',
                        role_tree(params, roles))

  matrices = optax.chain(
      contrib.scale_by_muon(ns_steps=newton_steps, beta=beta, weight_dimension_numbers=dims),
      optax.stateless(scaled))
  split = optax.partition(
      {'muon': matrices, 'adam': optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}, labels)
  return _optimizer([split], learning_rate=learning_rate, weight_decay=weight_decay,
                    clip_norm=clip_norm, decay=decay, roles=roles)


def role_tree(params: Any, roles: Rules = ()) -> Any:
  """Returns the role of every parameter, decided by its path.

  Args:
    params: nested dict of arrays or shapes.
    roles: (regex, role) tried before `ROLES`; the first whose regex is found in the path wins.
  Returns:
    The same tree with roles as leaves.
  Raises:
    ValueError: a given regex matches no parameter, an unknown role, or a parameter has none.
  """
  known = ('matrix', 'head', 'embedding', 'vector')
  for pattern, role in roles:
    if role not in known:
      raise ValueError(f'roles: {role!r} for {pattern!r}; allowed are {", ".join(known)}'
                       f'{_nearest(str(role), known)}')
  names = _paths(params)
  _check_matches([pattern for pattern, _ in roles], names, 'roles')
  table = [(re.compile(pattern), role) for pattern, role in (*roles, *ROLES)]
  found = {name: next((role for regex, role in table if regex.search(name)), None)
           for name in names}
  bare = [name for name, role in found.items() if role is None]
  if bare:
    raise ValueError(
        f'no role for {len(bare)} parameters: {", ".join(bare)}. Say what they are, for example '
        f"roles=(({re.escape(bare[0].rsplit('/')[-1]) + '$'!r}, 'matrix'),); allowed are "
        f'{", ".join(known)}')
  return jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], params)


def decay_mask(params: Any, decay: Sequence[Role] = ('matrix', 'head'), roles: Rules = ()) -> Any:
  """Returns which parameters decay: those whose role is one of `decay`."""
  return jax.tree.map(lambda role: role in decay, role_tree(params, roles))


def _optimizer(parts: list, *, learning_rate: float | schedules.Schedule, weight_decay: float,
               clip_norm: float | None, decay: Sequence[Role], roles: Rules) -> Optimizer:
  """Clips, applies `parts`, decays weights, and scales by the learning rate."""
  if clip_norm is not None and clip_norm <= 0:
    raise ValueError(f'clip_norm={clip_norm}; allowed are numbers above 0, or None for no clipping')
  if weight_decay < 0:
    raise ValueError(f'weight_decay={weight_decay}; allowed are numbers from 0')
  if isinstance(decay, str) or not set(decay) <= {'matrix', 'head', 'embedding', 'vector'}:
    raise ValueError(f'decay={decay!r}; allowed is a list of: matrix, head, embedding, vector')
  rate = schedules.as_schedule(learning_rate)
  mask = functools.partial(decay_mask, decay=decay, roles=roles)
  chain = optax.chain(
      *([] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]), *parts,
      *([optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []),
      optax.scale_by_learning_rate(cast(optax.Schedule, rate)))

  def init(params: Any) -> Any:
    if roles:
      role_tree(params, roles)
    return chain.init(params)

  def update(grads: Any, state: Any, params: Any = None) -> Any:
    return chain.update(grads, state, params)

  return Optimizer(init, update, rate)


def _dims(name: str, x: Any, inputs: Sequence[tuple[str, int]]) -> contrib.MuonDimensionNumbers:
  first = 1 if _STACKED.search(name) else 0
  first += 1 if _EXPERTS.search(name) and x.ndim == first + 3 else 0
  count = next(count for pattern, count in inputs if re.search(pattern, name))
  if not 1 <= count < x.ndim - first:
    raise ValueError(
        f'muon: {name} has shape {list(x.shape)}, {"after its stack of layers " if first else ""}'
        f'{x.ndim - first} dims, of which {count} would be inputs; at least one must be left for '
        f"outputs. Set input_dims=(({re.escape(name) + '$'!r}, ...),), or another role in roles")
  return contrib.MuonDimensionNumbers(tuple(range(first, first + count)),
                                      tuple(range(first + count, x.ndim)))


def _longer_side(x: Any, dims: contrib.MuonDimensionNumbers) -> int:
  sizes = [1, 1]
  for side, axes in enumerate((dims.reduction_axis, dims.output_axis)):
    for axis in axes if isinstance(axes, Sequence) else (axes,):
      sizes[side] *= x.shape[axis]
  return max(sizes)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _paths(params: Any) -> list[str]:
  return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _check_matches(patterns: Sequence[str], names: Sequence[str], setting: str) -> None:
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ValueError(f'{setting}: {pattern!r} matches no parameter{_nearest(pattern, names)}; '
                       'correct it or take it out')


def _nearest(text: str, names: Sequence[str]) -> str:
  close = difflib.get_close_matches(text, names, n=1, cutoff=0.3)
  return f' (nearest: {close[0]})' if close else ''
