"""Encoders that see a row in both directions: BERT (arXiv:1810.04805) and RoBERTa (1907.11692).

Letters: B batch, L length, D embed, V vocab.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models import attention, decoder, layers
from models import positions as positions_lib
from models.config import Activation, DecoderConfig
from partitioning import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """A stack of blocks without a causal order, under a head that predicts masked tokens.

  Attributes:
    stack: the blocks, the embeddings and the vocabulary; 'residual' norms end in one, so that only
      the others have another norm after the last block.
    types: entries of the table of token types, which is added to the embedded tokens; 0: none.
    first_position: entry of the learned positions that a document's first token has. Above 0, the
      entry before it is that of padding, the token of the same id.
    head_activation: of the head; None: as in the blocks.
  """

  stack: DecoderConfig
  types: int = 0
  first_position: int = 0
  head_activation: Activation | None = None

  def __post_init__(self):
    if self.head_activation not in (None, *get_args(Activation)):
      raise ValueError(f'EncoderConfig.head_activation={self.head_activation!r}; allowed: '
                       f'{", ".join(get_args(Activation))}')
    if self.head_activation == self.stack.activation:
      object.__setattr__(self, 'head_activation', None)
    if self.types < 0 or self.first_position < 0:
      raise ValueError(f'EncoderConfig.types={self.types} and first_position='
                       f'{self.first_position} must be 0 or more')
    if self.first_position and self.stack.position != 'learned':
      raise ValueError(f"EncoderConfig.first_position={self.first_position} needs "
                       f"position='learned', got {self.stack.position!r}")
    if self.first_position >= self.stack.max_length:
      raise ValueError(f'EncoderConfig.first_position={self.first_position} leaves no position of '
                       f'max_length={self.stack.max_length}')
    if self.stack.experts is not None:
      raise ValueError(f'EncoderConfig has no experts, got experts={self.stack.experts}')
    if self.stack.head_vocab != self.stack.vocab:
      raise ValueError(f'EncoderConfig.stack has out_vocab={self.stack.out_vocab}, but predicts '
                       f'its own vocab={self.stack.vocab}')

  @property
  def longest(self) -> int:
    """Tokens of the longest row."""
    return self.stack.max_length - self.first_position

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token: as `DecoderConfig.flops_per_token`, but every key is attended to.

    Args:
      length: tokens of a row.
    """
    stack = self.stack
    near = min(length, 2 * (stack.window or length) - 1)
    keys = sum(near if local else length for local in stack.local)
    products = stack.matmul_params() + stack.embed**2
    return 6.0 * products + 12 * stack.heads * stack.width_of_head * keys


class Encoder(nnx.Module):
  """Token ids to logits of the token at every place.

  The head is BERT's: a square layer, an activation and a norm before the output table.
  """

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.config, stack = config, config.stack
    self.embed = layers.Embed(stack, rngs)
    learned = stack.position == 'learned'
    self.position = positions_lib.LearnedPositions(stack, rngs) if learned else None
    self.types = Types(config, rngs) if config.types else None
    self.embed_norm = layers.Norm(stack)
    relative = stack.position == 'relative'
    self.relative = positions_lib.RelativePositions(stack, rngs, 'any') if relative else None
    self.layers = nnx.vmap(lambda r: decoder.Block(stack, r))(rngs.split(stack.layers))
    self.norm = None if stack.norms == 'residual' else layers.Norm(stack)
    self.transform = layers.Dense(rngs, ins={'embed': stack.embed}, outs={'mlp': stack.embed},
                                  bias='mlp' in stack.biases)
    self.transform_norm = layers.Norm(stack)
    untied, biased = stack.embeddings == 'untied', 'head' in stack.biases
    self.head = layers.Dense(rngs, ins={'embed': stack.embed}, outs={'vocab': stack.vocab},
                             bias=biased, scale=decoder.HEAD_SCALE) if untied else None
    self.head_bias = (layers.param(jnp.zeros((stack.vocab,), jnp.float32), ('vocab',))
                      if biased and not untied else None)

  def __call__(self, inputs: Int[Array, 'B L'], *, positions: Int[Array, 'B L'] | None = None,
               segment_ids: Int[Array, 'B L'] | None = None,
               types: Int[Array, 'B L'] | None = None,
               dropout_key: Key[Array, ''] | None = None) -> Float[Array, 'B L V']:
    """Logits of the token at every place, seen from all places of its segment.

    Args:
      inputs: token ids in [0, vocab).
      positions: position of each token in its document, from 0; None counts from the row's start,
        leaving out the padding that `first_position` speaks of.
      segment_ids: document of each token (0 is padding); tokens attend only within their own.
      types: type of each token; None: all 0.
      dropout_key: None disables dropout.
    Returns:
      float32 logits.
    Raises:
      ValueError: the row is longer than the learned positions, or there are no types.
    """
    x = self.encode(inputs, positions=positions, segment_ids=segment_ids, types=types,
                    dropout_key=dropout_key)
    act = layers.ACTIVATIONS[self.config.head_activation or self.config.stack.activation]
    x = self.transform_norm(act(self.transform(x, ('embed',))))
    logits = self.embed.attend(x) if self.head is None else self.head(x, ('vocab',))
    if self.head_bias is not None:
      bias = rules.gathered(self.head_bias[...], 'vocab')
      logits = logits + bias.astype(logits.dtype).reshape(1, 1, -1)
    logits = rules.constrain(logits.astype(jnp.float32), 'batch', 'length', 'vocab')
    cap = self.config.stack.logit_softcap
    return logits if cap is None else jnp.tanh(logits / cap) * cap

  def encode(self, inputs: Int[Array, 'B L'], *, positions: Int[Array, 'B L'] | None = None,
             segment_ids: Int[Array, 'B L'] | None = None, types: Int[Array, 'B L'] | None = None,
             dropout_key: Key[Array, ''] | None = None) -> Float[Array, 'B L D']:
    """What the head reads: the states after the last block; arguments as for a call."""
    stack = self.config.stack
    if stack.position == 'learned' and inputs.shape[1] > self.config.longest:
      raise ValueError(f'row of {inputs.shape[1]} tokens exceeds the {self.config.longest} learned '
                       f'positions from first_position={self.config.first_position} on')
    if types is not None and self.types is None:
      raise ValueError('token types are given, but EncoderConfig.types=0 has no table for them')
    positions = self._counted(inputs) if positions is None else positions
    x = self.embed(inputs)
    if self.position is not None:
      x = x + self.position(positions + self.config.first_position, x.dtype)
    if self.types is not None:
      x = x + self.types(jnp.zeros_like(inputs) if types is None else types, x.dtype)
    x = rules.constrain(self.embed_norm(x), 'batch', 'length', 'embed')
    input_key, layer_keys = decoder.dropout_keys(stack, dropout_key)
    x = layers.dropout(x, stack.dropout, input_key)
    bias = None if self.relative is None else self.relative(inputs.shape[1], inputs.shape[1])
    mask = attention.Mask(segment_ids, segment_ids, order='any', window=stack.window)
    x, _ = decoder.run_layers(stack, self.layers, x, mask=mask, layer_keys=layer_keys,
                              bias=bias, tables=positions_lib.rotary_tables(stack, positions))
    return x if self.norm is None else self.norm(x)

  def _counted(self, inputs: Int[Array, 'B L']) -> Int[Array, 'B L']:
    padding = self.config.first_position - 1
    if padding < 0:
      return decoder.counted(inputs)
    real = (inputs != padding).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real - 1


class Types(nnx.Module):
  """A table of token types, added to the embedded tokens."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    shape = (config.types, config.stack.embed)
    value = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
    self.embedding = layers.param(value, ('types', 'embed'))

  def __call__(self, types: Int[Array, 'B L'], dtype: jnp.dtype) -> Float[Array, 'B L D']:
    hot = jax.nn.one_hot(types, self.embedding.shape[0], dtype=dtype)
    table = rules.gathered(self.embedding[...], 'types', 'embed').astype(dtype)
    return rules.project(hot, table, ('batch', 'length', 'embed'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderLM:
  """The model definition a run is given; see `models.decoder.DecoderLM`."""

  config: EncoderConfig

  @property
  def vocab(self) -> int:
    """Vocabulary entries, checked against the data before a run."""
    return self.config.stack.vocab

  def build(self, rngs: nnx.Rngs) -> Encoder:
    """The module with freshly drawn parameters."""
    return Encoder(self.config, rngs)

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token; see `EncoderConfig.flops_per_token`."""
    return self.config.flops_per_token(length)
