"""The decoder's configuration: frozen, validated at construction, with its own arithmetic."""

import dataclasses
import difflib
from typing import Literal, get_args, get_type_hints

Activation = Literal['gelu', 'gelu_tanh', 'relu', 'silu']
Remat = Literal['none', 'full', 'dots', 'dots_no_batch']
Kernel = Literal['auto', 'reference', 'dot_product', 'splash']
DType = Literal['float32', 'bfloat16', 'float16']


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """One decoder-only transformer; GPT, MPT, Llama, Falcon and NeoX are settings of it.

  Attributes:
    vocab: vocabulary entries, padding included.
    embed: width of the residual stream.
    layers: number of blocks.
    heads: query heads.
    kv_heads: key and value heads; None means `heads` (MHA), 1 is MQA, between is GQA.
    head_dim: width of a head; None means embed / heads.
    mlp: hidden width of the MLP.
    mlp_form: 'gated' has two input matrices (GLU, arXiv:2002.05202), 'plain' one.
    activation: the MLP's nonlinearity; 'gelu' is exact, 'gelu_tanh' GPT-2's approximation.
    norm: 'rmsnorm' (arXiv:1910.07467) or 'layernorm'.
    norm_eps: added to the mean square or variance.
    block: 'serial' (attention, then MLP) or 'parallel' (both read the same residual, as GPT-J).
    position: 'rope' (arXiv:2104.09864), 'alibi' (arXiv:2108.12409), 'learned' or 'none'.
    rope_theta: base of the rotary frequencies.
    rope_fraction: share of head_dim that rotates.
    max_length: longest row; needed by learned positions, a check for the others.
    embeddings: 'tied' shares the input table with the output head, 'untied' has two.
    biases: which of 'qkv', 'out', 'mlp', 'norm', 'head' carry a bias.
    dropout: rate on the embedded input and on each branch's output; 0 disables.
    logit_softcap: cap of tanh soft capping of the logits; None disables.
    layer_loop: 'scan' compiles one layer once, 'unroll' compiles each (faster on CPU).
    remat: what the backward pass recomputes per layer.
    dtype: dtype of activations and matrix products; parameters, softmax and norms are float32.
    kernel: attention implementation; 'auto' chooses by backend.
  """

  vocab: int
  embed: int
  layers: int
  heads: int
  mlp: int
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_form: Literal['gated', 'plain'] = 'gated'
  activation: Activation = 'silu'
  norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'
  norm_eps: float = 1e-6
  block: Literal['serial', 'parallel'] = 'serial'
  position: Literal['rope', 'alibi', 'learned', 'none'] = 'rope'
  rope_theta: float = 10000.0
  rope_fraction: float = 1.0
  max_length: int = 2048
  embeddings: Literal['tied', 'untied'] = 'untied'
  biases: tuple[Literal['qkv', 'out', 'mlp', 'norm', 'head'], ...] = ()
  dropout: float = 0.0
  logit_softcap: float | None = None
  layer_loop: Literal['scan', 'unroll'] = 'scan'
  remat: Remat = 'none'
  dtype: DType = 'bfloat16'
  kernel: Kernel = 'auto'

  def __post_init__(self):
    for name in ('vocab', 'embed', 'layers', 'heads', 'mlp', 'max_length'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'DecoderConfig.{name} must be a positive integer, got {value!r}')
    self._check_choices()
    if self.head_dim is None and self.embed % self.heads:
      raise ValueError(f'DecoderConfig.embed={self.embed} is not divisible by heads={self.heads}; '
                       f'change one of them or set head_dim')
    if self.heads % self.num_kv_heads:
      raise ValueError(f'DecoderConfig.heads={self.heads} is not divisible by '
                       f'kv_heads={self.num_kv_heads}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'DecoderConfig.dropout must be in [0, 1), got {self.dropout}')
    if not 0 < self.rope_fraction <= 1 or self.rotary_dim % 2:
      raise ValueError(f'DecoderConfig.rope_fraction={self.rope_fraction} must be in (0, 1] and '
                       f'rotate an even number of the {self.width_of_head} head dimensions')

  def _check_choices(self):
    hints = get_type_hints(type(self))
    object.__setattr__(self, 'biases', tuple(self.biases))
    choices = {name: get_args(hint) for name, hint in hints.items()
               if get_args(hint) and all(isinstance(a, str) for a in get_args(hint))}
    checked = [(name, getattr(self, name)) for name in choices]
    checked += [('biases', bias) for bias in self.biases]
    choices['biases'] = get_args(get_args(hints['biases'])[0])
    for name, value in checked:
      if value not in choices[name]:
        near = difflib.get_close_matches(str(value), choices[name], 1)
        raise ValueError(f'DecoderConfig.{name}={value!r}; allowed: {", ".join(choices[name])}'
                         + (f'; did you mean {near[0]!r}?' if near else ''))

  @property
  def num_kv_heads(self) -> int:
    """Key and value heads."""
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def width_of_head(self) -> int:
    """Width of one head."""
    return self.embed // self.heads if self.head_dim is None else self.head_dim

  @property
  def rotary_dim(self) -> int:
    """Number of head dimensions that rotate."""
    return int(self.width_of_head * self.rope_fraction)

  def matmul_params(self) -> int:
    """Parameters that take part in a matrix product for every token (head yes, table no)."""
    attention = self.embed * self.width_of_head * 2 * (self.heads + self.num_kv_heads)
    mlp = self.embed * self.mlp * (3 if self.mlp_form == 'gated' else 2)
    return self.layers * (attention + mlp) + self.embed * self.vocab

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token: forward and backward, causal attention counted at its half.

    Args:
      length: tokens of a row; a query attends to (length + 1) / 2 keys on average.
    Returns:
      6 x matmul parameters + 12 x layers x heads x head_dim x (length + 1) / 2, after
      Kaplan et al. 2020 (arXiv:2001.08361) with the attention term kept.
    """
    attention = 12 * self.layers * self.heads * self.width_of_head * (length + 1) / 2
    return 6.0 * self.matmul_params() + attention

  def cache_bytes(self, batch: int, length: int) -> int:
    """Bytes of the key/value cache for `batch` rows of `length` tokens in the compute dtype."""
    width = 4 if self.dtype == 'float32' else 2
    return 2 * self.layers * batch * length * self.num_kv_heads * self.width_of_head * width
