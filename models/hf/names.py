"""Pieces of name tables and settings that several families share."""

from typing import Any, get_args

from models.config import Activation, DecoderConfig
from models.hf.table import Row, fused, row

ACTIVATIONS: dict[str, str] = {**{name: name for name in get_args(Activation)},
                               'gelu_tanh': 'gelu_new'}


def linear(theirs: str, ours: str, dims: str, *, bias: bool) -> list[Row]:
  """A torch Linear: weight [out, in] and perhaps a bias [out].

  Args:
    theirs: name of the module.
    ours: path of our Dense.
    dims: '(out) (in)' of the weight by our logical axes; the first is the bias's.
    bias: whether it has one.
  """
  out = dims.split(') ')[0] + ')' if dims.startswith('(') else dims.split(' ')[0]
  rows = [row(f'{theirs}.weight', f'{ours}/kernel', dims)]
  return rows + ([row(f'{theirs}.bias', f'{ours}/bias', out)] if bias else [])


def norm(theirs: str, ours: str, config: DecoderConfig, dims: str = 'norm') -> list[Row]:
  """A norm: weight and, where the configuration says so, bias."""
  rows = [row(f'{theirs}.weight', f'{ours}/scale', dims)]
  return rows + ([row(f'{theirs}.bias', f'{ours}/bias', dims)] if 'norm' in config.biases else [])


def head(theirs: str, config: DecoderConfig) -> list[Row]:
  """The output head, where it is not the input table."""
  rows = [] if config.embeddings == 'tied' else [row(f'{theirs}.weight', 'head/kernel',
                                                     'vocab embed')]
  if 'head' in config.biases:
    rows.append(row(f'{theirs}.bias', 'head_bias' if config.embeddings == 'tied' else 'head/bias',
                    'vocab'))
  return rows


def attention(where: str, config: DecoderConfig, *, query: str = 'q_proj', key: str = 'k_proj',
              value: str = 'v_proj', out: str = 'o_proj') -> list[Row]:
  """Four separate projections, and the norms of queries and keys where there are any."""
  ours, qkv = 'layers/attention', 'qkv' in config.biases
  rows = [*linear(f'{where}.{query}', f'{ours}/query', '(heads head_dim) embed', bias=qkv),
          *linear(f'{where}.{key}', f'{ours}/key', '(kv_heads head_dim) embed', bias=qkv),
          *linear(f'{where}.{value}', f'{ours}/value', '(kv_heads head_dim) embed', bias=qkv),
          *linear(f'{where}.{out}', f'{ours}/out', 'embed (heads head_dim)',
                  bias='out' in config.biases)]
  if config.qk_norm != 'none':
    dims = ('head_dim', 'head_dim') if config.qk_norm == 'head' else (
        '(heads head_dim)', '(kv_heads head_dim)')
    rows += [*norm(f'{where}.q_norm', f'{ours}/query_norm', config, dims[0]),
             *norm(f'{where}.k_norm', f'{ours}/key_norm', config, dims[1])]
  return rows


def joined(theirs: str, config: DecoderConfig, *, groups: str = '') -> list[Row]:
  """Query, key and value in one torch Linear, whole after whole or group by group.

  Args:
    theirs: name of the module.
    config: ours; says whether there is a bias.
    groups: logical axis whose entries each hold a piece of all three; '' joins whole ones.
  """
  def parts(what: str, rest: str) -> list[tuple[str, str]]:
    return [(f'layers/attention/{name}/{what}', f'({heads} head_dim){rest}') for name, heads in
            (('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads'))]
  rows = [fused(f'{theirs}.weight', *parts('kernel', ' embed'), groups=groups)]
  return rows + ([fused(f'{theirs}.bias', *parts('bias', ''), groups=groups)]
                 if 'qkv' in config.biases else [])


def gated(where: str, config: DecoderConfig) -> list[Row]:
  """Gate, up and down as Llama names them."""
  bias = 'mlp' in config.biases
  return [*linear(f'{where}.gate_proj', 'layers/mlp/gate', 'mlp embed', bias=bias),
          *linear(f'{where}.up_proj', 'layers/mlp/up', 'mlp embed', bias=bias),
          *linear(f'{where}.down_proj', 'layers/mlp/down', 'embed mlp', bias=bias)]


def plain(up: str, down: str, config: DecoderConfig) -> list[Row]:
  """Two matrices."""
  bias = 'mlp' in config.biases
  return [*linear(up, 'layers/mlp/up', 'mlp embed', bias=bias),
          *linear(down, 'layers/mlp/down', 'embed mlp', bias=bias)]


def llama_body(config: DecoderConfig) -> list[Row]:
  """Everything of a Llama but its norms and its MLP."""
  return [row('model.embed_tokens.weight', 'embed/embedding', 'vocab embed'),
          *attention('model.layers.{layer}.self_attn', config),
          *norm('model.norm', 'norm', config), *head('lm_head', config)]


def llama_settings(config: DecoderConfig) -> dict[str, Any]:
  """Settings that every descendant of Llama writes."""
  return {'vocab_size': config.vocab, 'hidden_size': config.embed,
          'num_hidden_layers': config.layers, 'num_attention_heads': config.heads,
          'num_key_value_heads': config.num_kv_heads, 'head_dim': config.width_of_head,
          'intermediate_size': config.mlp, 'hidden_act': ACTIVATIONS[config.activation],
          'rms_norm_eps': config.norm_eps, 'max_position_embeddings': config.max_length,
          'tie_word_embeddings': config.embeddings == 'tied', 'rope_parameters': rope(config)}


def without_usual_width(values: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
  """Settings without head_dim where it is hidden_size / num_attention_heads."""
  usual = config.width_of_head * config.heads == config.embed
  return {name: value for name, value in values.items() if name != 'head_dim' or not usual}


def rope(config: DecoderConfig, *, local: bool = False) -> dict[str, Any]:
  """Our rotary settings as `rope_parameters`."""
  theta, scaling = config.rope_theta, config.rope_scaling
  if local and config.local_rope_theta is not None:
    theta, scaling = config.local_rope_theta, config.local_rope_scaling
  out: dict[str, Any] = {'rope_type': 'default', 'rope_theta': theta}
  if config.rope_fraction != 1:
    out['partial_rotary_factor'] = config.rope_fraction
  if scaling is None:
    return out
  out['rope_type'] = scaling.kind
  if scaling.kind != 'longrope':
    out['factor'] = scaling.factor
  if scaling.kind == 'llama3':
    out |= {'low_freq_factor': scaling.low_frequency, 'high_freq_factor': scaling.high_frequency}
  if scaling.kind == 'yarn':
    out |= {'beta_fast': scaling.beta_fast, 'beta_slow': scaling.beta_slow,
            'truncate': scaling.truncate == 'ends', 'attention_factor': scaling.attention_factor}
  if scaling.kind == 'longrope':
    out |= {'short_factor': list(scaling.short_factors), 'long_factor': list(scaling.long_factors),
            'attention_factor': scaling.attention_factor, 'factor': scaling.factor}
  if scaling.kind in ('llama3', 'yarn', 'longrope'):
    out['original_max_position_embeddings'] = scaling.original_length
  return out


def older_rope(values: dict[str, Any]) -> dict[str, Any]:
  """Rewrites `rope_parameters` as `rope_theta`, `rope_scaling` and `partial_rotary_factor`."""
  values = dict(values)
  found = dict(values.pop('rope_parameters'))
  values['rope_theta'] = found.pop('rope_theta')
  if 'partial_rotary_factor' in found:
    values['partial_rotary_factor'] = found.pop('partial_rotary_factor')
  values['rope_scaling'] = None if found['rope_type'] == 'default' else found
  return values


def require(config: DecoderConfig, name: str, **wanted: Any) -> None:
  """Refuses a configuration that a family's settings cannot express.

  Args:
    config: ours.
    name: of the family.
    **wanted: fields and the one value the family has.
  Raises:
    ValueError: naming the first field that differs.
  """
  for field, value in wanted.items():
    if getattr(config, field) != value:
      raise ValueError(f'{name} has {field}={value!r}, but the configuration has '
                       f'{getattr(config, field)!r}')
