"""Encoder-decoders: T5 1.0 (arXiv:1910.10683) and 1.1 are settings of one.

Letters: B batch, S encoder length, L decoder length, D embed, V vocab.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models import attention, cache, decoder, layers
from models import positions as positions_lib
from models.config import DecoderConfig
from partitioning import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecConfig:
  """Two stacks over one table of tokens; the second reads what the first made of its row.

  Attributes:
    encoder: blocks that see their row in both directions; its `embeddings` and head are not used.
    decoder: blocks that see what came before, and the encoder's states; its `embeddings`, `biases`
      and `logit_softcap` are those of the head, its `embed_scale` of both sides' input.
    output_scale: multiplies the decoder's states before the head; T5 1.0's is embed ** -0.5.
  """

  encoder: DecoderConfig
  decoder: DecoderConfig
  output_scale: float = 1.0

  def __post_init__(self):
    for name in ('vocab', 'embed', 'dtype'):
      ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
      if ours != theirs:
        raise ValueError(f'EncDecConfig.encoder has {name}={ours!r}, but its decoder {theirs!r}; '
                         f'they share it')
    for side in (self.encoder, self.decoder):
      if side.experts is not None:
        raise ValueError(f'EncDecConfig has no experts, got experts={side.experts}')
    if self.decoder.block != 'serial':
      raise ValueError(f"EncDecConfig.decoder has block={self.decoder.block!r}; reading an encoder "
                       f"needs 'serial'")

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per target, with an encoder row as long as the decoder's.

    Args:
      length: tokens of a row.
    """
    encoder, reads = self.encoder, self.decoder
    near = min(length, 2 * (encoder.window or length) - 1)
    keys = sum(near if local else length for local in encoder.local)
    products = encoder.matmul_params() - encoder.embed * encoder.head_vocab
    cross = reads.embed * reads.width_of_head * 2 * (reads.heads + reads.num_kv_heads)
    attended = (encoder.heads * encoder.width_of_head * keys
                + reads.layers * reads.heads * reads.width_of_head * length)
    return reads.flops_per_token(length) + 6.0 * (products + reads.layers * cross) + 12 * attended


class Side(nnx.Module):
  """Embedded tokens to states: positions, blocks and a last norm."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, order: Literal['causal', 'any'],
               memory: Literal['none', 'read']):
    self.config, self.order = config, order
    learned, relative = config.position == 'learned', config.position == 'relative'
    self.position = positions_lib.LearnedPositions(config, rngs) if learned else None
    self.relative = positions_lib.RelativePositions(config, rngs, order) if relative else None
    self.layers = nnx.vmap(lambda r: decoder.Block(config, r, memory=memory))(
        rngs.split(config.layers))
    self.norm = None if config.norms == 'residual' else layers.Norm(config)

  def __call__(self, x: Float[Array, 'B L D'], *, positions: Int[Array, 'B L'],
               mask: attention.Mask, memory: attention.Memory | None = None,
               cached: tuple | None = None, key: Key[Array, ''] | None = None
               ) -> tuple[Float[Array, 'B L D'], Any]:
    """States of each place, and the updated keys and values."""
    config = self.config
    if self.position is not None:
      x = x + self.position(positions, x.dtype)
    input_key, layer_keys = decoder.dropout_keys(config, key)
    x = layers.dropout(x, config.dropout, input_key)
    keys = x.shape[1] if cached is None else cached[0].shape[2]
    bias = None if self.relative is None else self.relative(x.shape[1], keys, mask.offset)
    mask = dataclasses.replace(mask, order=self.order, window=config.window)
    x, (cached, _) = decoder.run_layers(
        config, self.layers, x, mask=mask, cached=cached, layer_keys=layer_keys, bias=bias,
        memory=memory, tables=positions_lib.rotary_tables(config, positions))
    x = x if self.norm is None else self.norm(x)
    return (x if key is None else layers.dropout(x, config.dropout, jax.random.fold_in(key, 1)),
            cached)


class EncDec(nnx.Module):
  """Token ids of two rows to logits of the next token of the second."""

  def __init__(self, config: EncDecConfig, rngs: nnx.Rngs):
    self.config, last = config, config.decoder
    self.embed = layers.Embed(last, rngs)
    self.encoder = Side(config.encoder, rngs, order='any', memory='none')
    self.decoder = Side(last, rngs, order='causal', memory='read')
    untied, biased = last.embeddings == 'untied', 'head' in last.biases
    self.head = layers.Dense(rngs, ins={'embed': last.embed}, outs={'vocab': last.head_vocab},
                             bias=biased, scale=decoder.HEAD_SCALE) if untied else None
    self.head_bias = (layers.param(jnp.zeros((last.vocab,), jnp.float32), ('vocab',))
                      if biased and not untied else None)

  def __call__(self, encoder_inputs: Int[Array, 'B S'], inputs: Int[Array, 'B L'], *,
               encoder_positions: Int[Array, 'B S'] | None = None,
               encoder_segment_ids: Int[Array, 'B S'] | None = None,
               positions: Int[Array, 'B L'] | None = None,
               segment_ids: Int[Array, 'B L'] | None = None,
               dropout_key: Key[Array, ''] | None = None) -> Float[Array, 'B L V']:
    """Logits of the decoder's next token at every place.

    Args:
      encoder_inputs: what is read, token ids in [0, vocab).
      inputs: what is written so far, begun with the start token.
      encoder_positions: position of each token in its document; None counts from the row's start.
      encoder_segment_ids: document of each token (0 is padding).
      positions: as `encoder_positions`, of the decoder.
      segment_ids: as `encoder_segment_ids`; a document reads the encoder's document of the same
        number. None on one side only: one document there.
      dropout_key: None disables dropout.
    Returns:
      float32 logits.
    """
    if (segment_ids is None) != (encoder_segment_ids is None):
      segment_ids = jnp.ones_like(inputs) if segment_ids is None else segment_ids
      encoder_segment_ids = (jnp.ones_like(encoder_inputs) if encoder_segment_ids is None
                             else encoder_segment_ids)
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    states = self.encode(encoder_inputs, positions=encoder_positions,
                         segment_ids=encoder_segment_ids, dropout_key=keys[0])
    reads = attention.Mask(segment_ids, encoder_segment_ids, order='any')
    x, _ = self.decoder(self.embed(inputs), mask=attention.Mask(segment_ids, segment_ids),
                        positions=_positions(self.config.decoder, inputs, positions),
                        memory=attention.Memory(reads, states), key=keys[1])
    return self._logits(x)

  def encode(self, inputs: Int[Array, 'B S'], *, positions: Int[Array, 'B S'] | None = None,
             segment_ids: Int[Array, 'B S'] | None = None,
             dropout_key: Key[Array, ''] | None = None) -> Float[Array, 'B S D']:
    """The encoder's states, after its last norm; arguments as for a call."""
    return self.encoder(self.embed(inputs), mask=attention.Mask(segment_ids, segment_ids),
                        positions=_positions(self.config.encoder, inputs, positions),
                        key=dropout_key)[0]

  def remember(self, encoder_inputs: Int[Array, 'B S'], own: cache.Cache, *,
               segment_ids: Int[Array, 'B S']) -> cache.EncDecCache:
    """Reads a row once, for all tokens that will be written.

    Args:
      encoder_inputs: what is read.
      own: the decoder's empty cache.
      segment_ids: 1 for real tokens, 0 for padding.
    Returns:
      A cache to `decode` with.
    """
    states = self.encode(encoder_inputs, segment_ids=segment_ids)
    graphdef, params = nnx.split(self.decoder.layers)

    def of_layer(p):
      cross = nnx.merge(graphdef, p).cross
      assert cross is not None
      return cross.keys_values(states)

    keys, values = jax.lax.map(of_layer, nnx.to_pure_dict(params))
    return cache.EncDecCache(own, keys, values, segment_ids)

  def decode(self, inputs: Int[Array, 'B L'], past: cache.EncDecCache, *,
             positions: Int[Array, 'B L'], segment_ids: Int[Array, 'B L']
             ) -> tuple[Float[Array, 'B L V'], cache.EncDecCache]:
    """Appends `inputs` to the decoder's cache and returns their logits.

    Args:
      inputs: the next tokens of each row.
      past: from `remember`, or from here.
      positions: their positions.
      segment_ids: 1 for real tokens, 0 for padding.
    Returns:
      Logits and the longer cache.
    """
    own = past.own
    segments = jax.lax.dynamic_update_slice_in_dim(own.segments, segment_ids, own.index, 1)
    reads = attention.Mask(segment_ids, past.segments, order='any')
    x, (keys, values) = self.decoder(
        self.embed(inputs), mask=attention.Mask(segment_ids, segments, own.index),
        positions=positions, cached=(own.key, own.value),
        memory=attention.Memory(reads, keys_values=(past.key, past.value)))
    own = cache.Cache(keys, values, segments, own.index + inputs.shape[1])
    return self._logits(x), past._replace(own=own)

  def _logits(self, x: jax.Array) -> jax.Array:
    last = self.config.decoder
    if self.config.output_scale != 1.0:
      x = x * jnp.asarray(self.config.output_scale, x.dtype)
    logits = self.embed.attend(x) if self.head is None else self.head(x, ('vocab',))
    if self.head_bias is not None:
      bias = rules.gathered(self.head_bias[...], 'vocab')
      logits = logits + bias.astype(logits.dtype).reshape(1, 1, -1)
    logits = rules.constrain(logits.astype(jnp.float32), 'batch', 'length', 'vocab')
    cap = last.logit_softcap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def _positions(config: DecoderConfig, inputs: jax.Array, given: jax.Array | None) -> jax.Array:
  if config.position == 'learned' and inputs.shape[1] > config.max_length:
    raise ValueError(f'row of {inputs.shape[1]} tokens exceeds max_length={config.max_length} of '
                     f'the learned positions')
  return decoder.counted(inputs) if given is None else given


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecLM:
  """The model definition a run is given; see `models.decoder.DecoderLM`."""

  config: EncDecConfig

  @property
  def vocab(self) -> int:
    """Vocabulary entries, checked against the data before a run."""
    return self.config.decoder.vocab

  def build(self, rngs: nnx.Rngs) -> EncDec:
    """The module with freshly drawn parameters."""
    return EncDec(self.config, rngs)

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per target; see `EncDecConfig.flops_per_token`."""
    return self.config.flops_per_token(length)

  def empty_cache(self, batch: int, length: int) -> cache.Cache:
    """A cache of the decoder for `batch` rows of `length` tokens; see `EncDec.remember`."""
    return cache.empty(self.config.decoder, batch, length)
