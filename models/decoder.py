"""One block, one decoder: GPT, MPT, Llama, Falcon and NeoX are configurations of it.

Letters: B batch, L length, D embed, V vocab.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models import attention, cache, layers, moe, positions
from models.config import DecoderConfig
from partitioning import rules

POLICIES = {
    'full': None,
    'dots': jax.checkpoint_policies.dots_saveable,
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# Logits start near zero, so that the first steps do not have to undo a random guess.
HEAD_SCALE = 0.1


class Block(nnx.Module):
  """Attention and MLP around the residual stream; between them, perhaps, a look at an encoder."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *,
               memory: Literal['none', 'read'] = 'none'):
    self.config = config
    # All 2 x layers branches together start as large as the embedding they are added to (GPT-2's
    # 1/sqrt(2 layers)); larger, they would drown the token, which costs half the early learning.
    scale = layers.embed_deviation(config) * (2 * config.layers) ** -0.5
    norm = lambda wanted: layers.Norm(config) if wanted else None
    before, after = config.norms in ('pre', 'both'), config.norms != 'pre'
    self.norm1 = norm(before)
    self.norm2 = norm(before and config.block != 'parallel')
    self.after1, self.after2 = norm(after), norm(after)
    self.attention = attention.Attention(config, rngs, out_scale=scale)
    one = layers.MLP if config.experts is None else moe.Experts
    self.mlp = one(config, rngs, out_scale=scale)
    reads = memory == 'read'
    self.cross_norm, self.cross_after = norm(before and reads), norm(after and reads)
    self.cross = attention.Attention(config, rngs, out_scale=scale) if reads else None

  def __call__(self, x: Float[Array, 'B L D'], *, mask: attention.Mask, rotary: tuple | None,
               cached: tuple | None, key: Key[Array, ''] | None,
               bias: jax.Array | None = None, memory: attention.Memory | None = None,
               depth: Float[Array, ''] | None = None
               ) -> tuple[Float[Array, 'B L D'], tuple | None, moe.Routed | None]:
    rate, residual = self.config.dropout, self.config.norms == 'residual'
    keys = (None, None) if key is None else jax.random.split(key)
    h = _maybe(self.norm1, x)
    attended, cached = self.attention(h, mask=mask, rotary=rotary, cached=cached, bias=bias,
                                      depth=depth)
    if not residual:
      attended = _maybe(self.after1, attended)
    attended = layers.dropout(attended, rate, keys[0])
    if self.config.block != 'serial':
      h = h if self.norm2 is None else self.norm2(x)
      made, routed = self._mlp(h, mask)
      x = x + attended + layers.dropout(made, rate, keys[1])
      return rules.constrain(x, 'batch', 'length', 'embed'), cached, routed
    x = _maybe(self.after1, x + attended) if residual else x + attended
    if self.cross is not None and memory is not None:
      x = self._read(x, memory, None if key is None else jax.random.fold_in(key, 2))
    made, routed = self._mlp(_maybe(self.norm2, x), mask)
    if not residual:
      made = _maybe(self.after2, made)
    x = x + layers.dropout(made, rate, keys[1])
    x = _maybe(self.after2, x) if residual else x
    return rules.constrain(x, 'batch', 'length', 'embed'), cached, routed

  def _read(self, x: jax.Array, memory: attention.Memory, key: Any) -> jax.Array:
    assert self.cross is not None
    residual = self.config.norms == 'residual'
    found = self.cross.read(_maybe(self.cross_norm, x), memory)
    found = found if residual else _maybe(self.cross_after, found)
    x = x + layers.dropout(found, self.config.dropout, key)
    return _maybe(self.cross_after, x) if residual else x

  def _mlp(self, x: jax.Array, mask: attention.Mask) -> tuple[jax.Array, moe.Routed | None]:
    if isinstance(self.mlp, moe.Experts):
      return self.mlp(x, None if mask.queries is None else mask.queries > 0)
    return self.mlp(x), None


def _maybe(norm: layers.Norm | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)


@jax.custom_vjp
def unstack(stacked: Any) -> tuple[Any, ...]:
  """Splits the leading axis of every leaf; its transpose stacks once.

  The transpose of indexing would pad every layer's gradient to the full size and add them up.
  """
  count = jax.tree.leaves(stacked)[0].shape[0]
  return tuple(jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(count))


unstack.defvjp(lambda stacked: (unstack(stacked), None),
               lambda _, grads: (jax.tree.map(lambda *g: jnp.stack(g), *grads),))


def counted(inputs: Int[Array, 'B L']) -> Int[Array, 'B L']:
  """Positions 0, 1, ... of every row."""
  return jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32)[None], inputs.shape)


def dropout_keys(config: DecoderConfig, key: Key[Array, ''] | None) -> tuple[Any, Any]:
  """Dropout keys of the embedded input and of each layer; (None, None) where nothing is dropped."""
  if key is None or not config.dropout:
    return None, None
  input_key, layer_key = jax.random.split(key)
  return input_key, jax.random.split(layer_key, config.layers)


def run_layers(config: DecoderConfig, blocks: Block, x: Float[Array, 'B L D'], *, mask:
               attention.Mask, tables: tuple, cached: tuple | None = None, layer_keys: Any = None,
               bias: jax.Array | None = None, memory: attention.Memory | None = None
               ) -> tuple[Float[Array, 'B L D'], Any]:
  """Runs stacked blocks one after the other, scanned or unrolled.

  Args:
    config: of the blocks.
    blocks: stacked on a leading axis.
    x: residual stream.
    mask: who attends to whom.
    tables: rotary tables of global and of local layers.
    cached: keys and values [N, B, S, G, K] of all layers, or None.
    layer_keys: one dropout key per layer, or None.
    bias: added to the scores of every layer, or None.
    memory: of an encoder, for blocks that read it; keys and values, if given, of all layers.
  Returns:
    The residual stream; the updated keys and values, and what routers decided, of all layers.
  """
  graphdef, params = nnx.split(blocks)
  params = nnx.to_pure_dict(params)

  def body(local, x, per_layer):
    p, past, key, flag, read, depth = per_layer
    local = flag if local is None else local
    seen = None if memory is None else dataclasses.replace(memory, keys_values=read)
    x, *kept = nnx.merge(graphdef, p)(
        x, mask=dataclasses.replace(mask, windowed=local), rotary=_select(tables, local),
        cached=past, key=key, bias=bias, memory=seen, depth=depth)
    return x, tuple(kept)

  read = None if memory is None else memory.keys_values
  depths = (jnp.arange(1, config.layers + 1, dtype=jnp.float32)
            if config.attention_depth == 'inverse' else None)
  scanned = config.layer_loop == 'scan'
  if config.remat != 'none':
    body = jax.checkpoint(body, policy=POLICIES[config.remat], prevent_cse=not scanned,
                          static_argnums=0)
  if scanned:
    # Where all layers are of one kind it is known while tracing; else it is scanned over.
    kinds = set(config.local)
    known = kinds.pop() if len(kinds) == 1 else None
    flags = jnp.asarray(config.local) if known is None else None
    return jax.lax.scan(functools.partial(body, known), x,
                        (params, cached, layer_keys, flags, read, depths))
  outs = []
  for i, p in enumerate(unstack(params)):
    past, key, seen, depth = jax.tree.map(lambda a, i=i: a[i], (cached, layer_keys, read, depths))
    x, out = body(config.local[i], x, (p, past, key, None, seen, depth))
    outs.append(out)
  return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)


class Decoder(nnx.Module):
  """Token ids to logits.

  Layers are stacked on a leading axis whatever the loop, so a checkpoint, an optimizer state and
  a decay mask do not depend on how layers are executed.
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.config = config
    self.embed = layers.Embed(config, rngs)
    learned = config.position == 'learned'
    self.position = positions.LearnedPositions(config, rngs) if learned else None
    relative = config.position == 'relative'
    self.relative = positions.RelativePositions(config, rngs, 'causal') if relative else None
    self.layers = nnx.vmap(lambda r: Block(config, r))(rngs.split(config.layers))
    self.norm = layers.Norm(config)
    untied = config.embeddings == 'untied'
    self.head = layers.Dense(rngs, ins={'embed': config.embed}, outs={'vocab': config.head_vocab},
                             bias='head' in config.biases, scale=HEAD_SCALE) if untied else None
    self.head_bias = (layers.param(jnp.zeros((config.vocab,), jnp.float32), ('vocab',))
                      if not untied and 'head' in config.biases else None)

  def __call__(self, inputs: Int[Array, 'B L'], *, positions: Int[Array, 'B L'] | None = None,
               segment_ids: Int[Array, 'B L'] | None = None,
               prefix: Int[Array, 'B L'] | None = None,
               dropout_key: Key[Array, ''] | None = None) -> Float[Array, 'B L V']:
    """Logits of the next token at every place.

    Args:
      inputs: token ids in [0, vocab).
      positions: position of each token in its document; None counts from the row's start.
      segment_ids: document of each token (0 is padding); tokens attend only within their own.
      prefix: above 0 for the tokens at the beginning of a document that all of it attends to, those
        before them too; None: tokens attend to those before them alone.
      dropout_key: None disables dropout.
    Returns:
      float32 logits.
    """
    return self._whole(inputs, positions, segment_ids, dropout_key, prefix)[0]

  def logits_and_router(self, inputs: Int[Array, 'B L'], *,
                        positions: Int[Array, 'B L'] | None = None,
                        segment_ids: Int[Array, 'B L'] | None = None,
                        prefix: Int[Array, 'B L'] | None = None,
                        dropout_key: Key[Array, ''] | None = None
                        ) -> tuple[Float[Array, 'B L V'], moe.Routed]:
    """What a call returns, and what the routers of all layers decided.

    Args:
      inputs: as in a call.
      positions: as in a call.
      segment_ids: as in a call.
      prefix: as in a call.
      dropout_key: as in a call.
    Raises:
      ValueError: the configuration has no experts.
    """
    if self.config.experts is None:
      raise ValueError('the model has no router: DecoderConfig.experts is None; set it, or leave '
                       'balance_loss and router_z_loss at 0')
    logits, _, routed = self._whole(inputs, positions, segment_ids, dropout_key, prefix)
    return logits, routed

  def _whole(self, inputs, positions, segment_ids, dropout_key, prefix):
    _check_length(self.config, inputs.shape[1])
    mask = attention.Mask(segment_ids, segment_ids, window=self.config.window, prefix=prefix)
    return self._run(inputs, positions, mask, None, dropout_key)

  def decode(self, inputs: Int[Array, 'B L'], past: cache.Cache, *,
             positions: Int[Array, 'B L'], segment_ids: Int[Array, 'B L'],
             prefix: Int[Array, 'B L'] | None = None) -> tuple[Float[Array, 'B L V'], cache.Cache]:
    """Appends `inputs` to the cache and returns their logits; prefill is the same with L > 1.

    Args:
      inputs: the next tokens of each row.
      past: keys and values so far.
      positions: their positions.
      segment_ids: 1 for real tokens, 0 for padding.
      prefix: above 0 for tokens that all of `inputs` attend to; a prefix must come whole.
    Returns:
      Logits and the longer cache.
    """
    update = jax.lax.dynamic_update_slice_in_dim
    segments = update(past.segments, segment_ids, past.index, 1)
    if prefix is not None:
      prefix = update(jnp.zeros_like(segments), prefix, past.index, 1)
    mask = attention.Mask(segment_ids, segments, past.index, window=self.config.window,
                          prefix=prefix)
    logits, stacked, _ = self._run(inputs, positions, mask, (past.key, past.value), None)
    keys, values = stacked
    return logits, cache.Cache(keys, values, segments, past.index + inputs.shape[1])

  def _run(self, inputs, positions_BL, mask, cached, key) -> tuple[jax.Array, Any, Any]:
    config = self.config
    positions_BL = counted(inputs) if positions_BL is None else positions_BL
    x = self.embed(inputs)
    if self.position is not None:
      x = x + self.position(positions_BL, x.dtype)
    input_key, layer_keys = dropout_keys(config, key)
    x = layers.dropout(x, config.dropout, input_key)
    tables = positions.rotary_tables(config, positions_BL)
    bias = None
    if self.relative is not None:
      keys = inputs.shape[1] if cached is None else cached[0].shape[2]
      bias = self.relative(inputs.shape[1], keys, mask.offset)
    x, (cached, routed) = run_layers(config, self.layers, x, mask=mask, tables=tables,
                                     cached=cached, layer_keys=layer_keys, bias=bias)
    x = self.norm(x)
    logits = self.embed.attend(x) if self.head is None else self.head(x, ('vocab',))
    if self.head_bias is not None:
      bias = rules.gathered(self.head_bias[...], 'vocab')
      logits = logits + bias.astype(logits.dtype).reshape(1, 1, -1)
    logits = rules.constrain(logits.astype(jnp.float32), 'batch', 'length', 'vocab')
    if config.logit_softcap is not None:
      logits = jnp.tanh(logits / config.logit_softcap) * config.logit_softcap
    return logits, cached, routed


def _check_length(config: DecoderConfig, length: int) -> None:
  # Beyond the table a position would read as zeros, without a word.
  if config.position == 'learned' and length > config.max_length:
    raise ValueError(f'row of {length} tokens exceeds max_length={config.max_length} of the '
                     f'learned positions')


def _select(tables: tuple, local: Any) -> tuple | None:
  """The rotary table of a layer's kind."""
  everywhere, of_local = tables
  if everywhere is of_local or isinstance(local, bool):
    return of_local if local is True else everywhere
  return jax.tree.map(lambda a, b: jnp.where(local, a, b), of_local, everywhere)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderLM:
  """The model definition a run is given: how to build the module, and what it costs.

  Any object with `build(rngs) -> flax.nnx.Module` can take its place; `flops_per_token` and
  `empty_cache` are optional and enable MFU and cached decoding.
  """

  config: DecoderConfig

  @property
  def vocab(self) -> int:
    """Vocabulary entries, checked against the data before a run."""
    return self.config.vocab

  def build(self, rngs: nnx.Rngs) -> Decoder:
    """The module with freshly drawn parameters."""
    return Decoder(self.config, rngs)

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token; see `DecoderConfig.flops_per_token`."""
    return self.config.flops_per_token(length)

  def empty_cache(self, batch: int, length: int) -> cache.Cache:
    """A key/value cache for `batch` rows of `length` tokens."""
    _check_length(self.config, length)
    return cache.empty(self.config, batch, length)
