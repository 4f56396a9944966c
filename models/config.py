"""Configurations of transformers: frozen, validated at construction, with their arithmetic."""

import dataclasses
import difflib
import types
from typing import Any, Literal, get_args, get_type_hints

Activation = Literal['gelu', 'gelu_tanh', 'gelu_10', 'quick_gelu', 'hardswish', 'laplace',
                     'leaky_relu', 'linear', 'mish', 'relu', 'relu2', 'relu6', 'sigmoid', 'silu',
                     'sqrtsoftplus', 'tanh']
Remat = Literal['none', 'full', 'dots', 'dots_no_batch']
Kernel = Literal['auto', 'reference', 'dot_product', 'splash']
DType = Literal['float32', 'bfloat16', 'float16']


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies are changed for rows longer than those of the first training.

  Attributes:
    kind: 'linear' divides all frequencies (arXiv:2306.15595); 'dynamic' raises the base with the
      row (NTK-aware); 'llama3' divides the slow ones (Llama 3, arXiv:2407.21783); 'yarn' ramps
      between the two (arXiv:2309.00071); 'longrope' has a factor per frequency (arXiv:2402.13753).
    factor: how many times longer rows are; for 'longrope' only through `attention_factor`.
    original_length: longest row of the first training; not used by 'linear'.
    low_frequency: 'llama3': waves longer than original_length / this are divided by `factor`.
    high_frequency: 'llama3': waves shorter than original_length / this are kept.
    beta_fast: 'yarn': turns over original_length above which a frequency is kept.
    beta_slow: 'yarn': turns below which a frequency is divided by `factor`.
    truncate: 'yarn': whether the ends of the ramp are whole numbers.
    short_factors: 'longrope': divisors for rows up to original_length, one per frequency.
    long_factors: 'longrope': divisors for longer rows.
    attention_factor: multiplies cosine and sine; 1 changes nothing.
  """

  kind: Literal['linear', 'dynamic', 'llama3', 'yarn', 'longrope']
  factor: float = 1.0
  original_length: int | None = None
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: Literal['ends', 'none'] = 'ends'
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()
  attention_factor: float = 1.0

  def __post_init__(self):
    check_choices(self)
    if self.kind != 'linear' and self.original_length is None:
      raise ValueError(f'RopeScaling.original_length must be set for kind={self.kind!r}')
    if self.factor <= 0 or self.attention_factor <= 0:
      raise ValueError(f'RopeScaling.factor={self.factor} and attention_factor='
                       f'{self.attention_factor} must be above 0')
    for name in ('short_factors', 'long_factors'):
      object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
    if self.kind == 'longrope' and not (self.short_factors and self.long_factors):
      raise ValueError("RopeScaling.kind='longrope' needs short_factors and long_factors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """One stack of transformer blocks; GPT, MPT, Llama, Falcon, NeoX and others are settings of it.

  Attributes:
    vocab: vocabulary entries, padding included.
    embed: width of the residual stream.
    layers: number of blocks.
    heads: query heads.
    kv_heads: key and value heads; None means `heads` (MHA), 1 is MQA, between is GQA.
    head_dim: width of a head; None means embed / heads.
    mlp: hidden width of the MLP, or of one expert.
    out_vocab: entries of the output head; None means `vocab`.
    mlp_form: 'gated' has two input matrices (GLU, arXiv:2002.05202), 'plain' one.
    activation: the MLP's nonlinearity; 'gelu' is exact, 'gelu_tanh' GPT-2's approximation; the
      others are `models.layers.ACTIVATIONS`.
    norm: 'rmsnorm' (arXiv:1910.07467) or 'layernorm'.
    norm_eps: added to the mean square or variance.
    norm_offset: added to every stored scale; 1 for Gemma, which stores scale - 1.
    norms: where they stand: 'pre' x + f(norm(x)); 'branch' x + norm(f(x)), as OLMo 2; 'both'
      x + norm(f(norm(x))), as Gemma 2; 'residual' norm(x + f(x)), as BERT.
    block: 'serial' (attention, then MLP); 'parallel' (both read the same normalised residual, as
      GPT-J); 'parallel_norms' (both read the same residual, each through its own norm, as NeoX).
    position: 'rope' (arXiv:2104.09864), 'alibi' (arXiv:2108.12409), 'relative' (a learned bias per
      bucket of distances, T5, arXiv:1910.10683), 'learned' or 'none'.
    rope_theta: base of the rotary frequencies.
    rope_fraction: share of head_dim that rotates; an odd number of dims rotates as the even one
      above it, its frequencies spread over the odd one, as in the reference.
    rope_layout: which dims rotate together: 'halves' as NeoX and Llama, 'neighbours' as GPT-J.
    rope_scaling: for rows longer than those of the first training; None: as they are.
    local_rope_theta: base in layers of kind 'local'; None: as in the others, scaling included.
    local_rope_scaling: where `local_rope_theta` is set, the scaling of these layers.
    alibi_order: order of the slopes of head counts that are no power of two: 'paper' or 'mpt'.
    alibi_max: the exponent of the smallest slope of a head count that is a power of two, 2 ** -8.
    alibi_scale: multiplies the bias; Falcon's is head_dim ** -0.5.
    alibi_rounding: 'bfloat16' rounds slopes and their products with the keys' places, as Falcon.
    relative_buckets: of distances, both directions together.
    relative_distance: from which on all distances share a bucket.
    max_length: longest row; needed by learned positions, a check for the others.
    embeddings: 'tied' shares the input table with the output head, 'untied' has two.
    embed_scale: multiplies the embedded tokens; Gemma's is embed ** 0.5.
    biases: which of 'qkv', 'out', 'mlp', 'norm', 'head' carry a bias.
    attention_scale: multiplies queries; None means head_dim ** -0.5.
    attention_depth: 'inverse' divides the scores of layer 1, 2, ... by 1, 2, ... too.
    attention_softcap: cap of tanh soft capping of attention scores; None disables.
    qk_norm: norm of queries and keys before rotation: per 'head', over 'all' heads, or 'none'.
    clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv]; None: not.
    window: keys a query of a 'local' layer sees, itself included; None: all.
    pattern: kinds of the layers, 'local' or 'global', repeated over them.
    experts: experts per layer (see `models.moe`); None: one MLP.
    experts_per_token: how many each token is sent to.
    expert_capacity: places per expert as a multiple of its even share; None: all tokens fit.
    router_weights: 'renormalised' over the chosen experts (Mixtral) or the 'softmax' over all
      (Switch).
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
  out_vocab: int | None = None
  mlp_form: Literal['gated', 'plain'] = 'gated'
  activation: Activation = 'silu'
  norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  norms: Literal['pre', 'branch', 'both', 'residual'] = 'pre'
  block: Literal['serial', 'parallel', 'parallel_norms'] = 'serial'
  position: Literal['rope', 'alibi', 'relative', 'learned', 'none'] = 'rope'
  rope_theta: float = 10000.0
  rope_fraction: float = 1.0
  rope_layout: Literal['halves', 'neighbours'] = 'halves'
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float | None = None
  local_rope_scaling: RopeScaling | None = None
  alibi_order: Literal['paper', 'mpt'] = 'paper'
  alibi_max: float = 8.0
  alibi_scale: float = 1.0
  alibi_rounding: Literal['none', 'bfloat16'] = 'none'
  relative_buckets: int = 32
  relative_distance: int = 128
  max_length: int = 2048
  embeddings: Literal['tied', 'untied'] = 'untied'
  embed_scale: float = 1.0
  biases: tuple[Literal['qkv', 'out', 'mlp', 'norm', 'head'], ...] = ()
  attention_scale: float | None = None
  attention_depth: Literal['same', 'inverse'] = 'same'
  attention_softcap: float | None = None
  qk_norm: Literal['none', 'head', 'all'] = 'none'
  clip_qkv: float | None = None
  window: int | None = None
  pattern: tuple[Literal['local', 'global'], ...] = ('global',)
  experts: int | None = None
  experts_per_token: int = 2
  expert_capacity: float | None = None
  router_weights: Literal['renormalised', 'softmax'] = 'renormalised'
  dropout: float = 0.0
  logit_softcap: float | None = None
  layer_loop: Literal['scan', 'unroll'] = 'scan'
  remat: Remat = 'none'
  dtype: DType = 'bfloat16'
  kernel: Kernel = 'auto'

  def __post_init__(self):
    for name in ('biases', 'pattern'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    for name in ('vocab', 'embed', 'layers', 'heads', 'mlp', 'max_length', 'experts_per_token'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'DecoderConfig.{name} must be a positive integer, got {value!r}')
    check_choices(self)
    if self.head_dim is None and self.embed % self.heads:
      raise ValueError(f'DecoderConfig.embed={self.embed} is not divisible by heads={self.heads}; '
                       f'change one of them or set head_dim')
    if self.heads % self.num_kv_heads:
      raise ValueError(f'DecoderConfig.heads={self.heads} is not divisible by '
                       f'kv_heads={self.num_kv_heads}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'DecoderConfig.dropout must be in [0, 1), got {self.dropout}')
    self._check_rotation()
    self._check_combinations()

  def _check_rotation(self):
    if self.position != 'rope':
      return
    if not 0 < self.rope_fraction <= 1 or not self.rotary_dim:
      raise ValueError(f'DecoderConfig.rope_fraction={self.rope_fraction} must be in (0, 1] and '
                       f'rotate some of the {self.width_of_head} head dimensions')
    odd = self.rotary_dim % 2
    if odd and (self.rope_layout == 'neighbours' or self.rotary_dim == self.width_of_head):
      raise ValueError(f'DecoderConfig.rope_fraction={self.rope_fraction} must rotate an even '
                       f'number of the {self.width_of_head} head dimensions')

  def _check_combinations(self):
    if self.position == 'relative' and not (
        4 <= self.relative_buckets and self.relative_buckets // 2 < self.relative_distance):
      raise ValueError(f'DecoderConfig.relative_buckets={self.relative_buckets} must be at least '
                       f'4, and half of it below relative_distance={self.relative_distance}')
    if 'local' in self.pattern and self.window is None and self.local_rope_theta is None:
      raise ValueError("DecoderConfig.pattern has 'local' layers; set their window")
    if self.window is not None and (self.window < 1 or 'local' not in self.pattern):
      raise ValueError(f"DecoderConfig.window={self.window} must be at least 1 and needs a pattern "
                       f"with 'local' layers")
    if not self.pattern:
      raise ValueError("DecoderConfig.pattern must not be empty; ('global',) is the default")
    if self.experts is not None and self.experts_per_token > self.experts:
      raise ValueError(f'DecoderConfig.experts_per_token={self.experts_per_token} exceeds '
                       f'experts={self.experts}')
    if self.norms != 'pre' and self.block != 'serial':
      raise ValueError(f"DecoderConfig.block={self.block!r} needs norms='pre', got {self.norms!r}")
    if self.embeddings == 'tied' and self.head_vocab != self.vocab:
      raise ValueError(f"DecoderConfig.embeddings='tied' needs out_vocab={self.out_vocab} to be "
                       f'vocab={self.vocab}')
    if self.local_rope_scaling is not None and self.local_rope_theta is None:
      raise ValueError('DecoderConfig.local_rope_scaling needs local_rope_theta; without it, local '
                       'layers rotate as the others')
    for scaling in (self.rope_scaling, self.local_rope_scaling):
      for name in ('short_factors', 'long_factors'):
        if (scaling is not None and scaling.kind == 'longrope'
            and len(getattr(scaling, name)) != self.rotary_dim // 2):
          raise ValueError(f'RopeScaling.{name} has {len(getattr(scaling, name))} factors, but '
                           f'{self.rotary_dim // 2} frequencies rotate')

  @property
  def num_kv_heads(self) -> int:
    """Key and value heads."""
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def width_of_head(self) -> int:
    """Width of one head."""
    return self.embed // self.heads if self.head_dim is None else self.head_dim

  @property
  def head_vocab(self) -> int:
    """Entries of the output head."""
    return self.vocab if self.out_vocab is None else self.out_vocab

  @property
  def rotary_dim(self) -> int:
    """Number of head dimensions that rotate."""
    return int(self.width_of_head * self.rope_fraction)

  @property
  def local(self) -> tuple[bool, ...]:
    """Whether each layer is of kind 'local'."""
    return tuple(self.pattern[i % len(self.pattern)] == 'local' for i in range(self.layers))

  def matmul_params(self) -> int:
    """Parameters that take part in a matrix product for every token (head yes, table no)."""
    attention = self.embed * self.width_of_head * 2 * (self.heads + self.num_kv_heads)
    mlp = self.embed * self.mlp * (3 if self.mlp_form == 'gated' else 2)
    if self.experts is not None:
      mlp = mlp * self.experts_per_token + self.embed * self.experts
    return self.layers * (attention + mlp) + self.embed * self.head_vocab

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token: forward and backward, causal attention counted at its half.

    Args:
      length: tokens of a row; a query attends to (length + 1) / 2 keys on average, to fewer where
        a window is shorter than the row.
    Returns:
      6 x matmul parameters + 12 x heads x head_dim x keys per query, summed over layers, after
      Kaplan et al. 2020 (arXiv:2001.08361) with the attention term kept.
    """
    short = min(length, self.window or length)
    local = (short * (short + 1) / 2 + (length - short) * short) / length
    keys = sum(local if is_local else (length + 1) / 2 for is_local in self.local)
    return 6.0 * self.matmul_params() + 12 * self.heads * self.width_of_head * keys

  def cache_bytes(self, batch: int, length: int) -> int:
    """Bytes of the key/value cache for `batch` rows of `length` tokens in the compute dtype."""
    width = 4 if self.dtype == 'float32' else 2
    return 2 * self.layers * batch * length * self.num_kv_heads * self.width_of_head * width


def check_choices(config: Any) -> None:
  """Refuses a value that is none of its field's literals.

  Args:
    config: a dataclass instance whose string fields are annotated with `Literal`.
  Raises:
    ValueError: naming the field, what is allowed, and the nearest of it.
  """
  for name, hint in get_type_hints(type(config)).items():
    value = getattr(config, name)
    values = (value,)
    if get_args(hint) and get_args(hint)[-1] is Ellipsis:
      hint, values = get_args(hint)[0], value
    if isinstance(hint, types.UnionType) or not get_args(hint):
      continue
    allowed = get_args(hint)
    for one in values:
      if all(isinstance(a, str) for a in allowed) and one not in allowed:
        near = difflib.get_close_matches(str(one), allowed, 1)
        raise ValueError(f'{type(config).__name__}.{name}={one!r}; allowed: {", ".join(allowed)}'
                         + (f'; did you mean {near[0]!r}?' if near else ''))
