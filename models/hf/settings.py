"""Reads a `config.json` in its current and its older spelling, and says what nobody read."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from models.config import Activation, RopeScaling

T = TypeVar('T')
_REQUIRED = object()

# Their names of activations; those with parameters of their own (prelu, xielu) are not among them.
ACTIVATIONS: dict[str, Any] = {name: name for name in get_args(Activation) if name != 'gelu_tanh'}
ACTIVATIONS |= {'gelu_python': 'gelu', 'swish': 'silu'} | dict.fromkeys(
    ('gelu_new', 'gelu_fast', 'gelu_accurate', 'gelu_pytorch_tanh', 'gelu_python_tanh'),
    'gelu_tanh')

# What does not change a logit: bookkeeping, dropout, initialisation, generation.
HARMLESS = frozenset('''
    _name_or_path architectures transformers_version dtype torch_dtype use_cache initializer_range
    initializer_factor bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id
    unk_token_id decoder_start_token_id is_encoder_decoder is_decoder add_cross_attention
    attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop emb_pdrop dropout
    dropout_rate attention_probs_dropout_prob hidden_dropout_prob classifier_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate
    id2label label2id num_labels problem_type finetuning_task auto_map quantization_config
    pretraining_tp init_device init_config model_type task_specific_params n_ctx
    gradient_checkpointing chunk_size_feed_forward tokenizer_class prefix torchscript
    embedding_fraction reorder_and_upcast_attn scale_decoder_outputs router_aux_loss_coef
    router_jitter_noise tie_encoder_decoder pruned_heads use_bfloat16 verbose cache_implementation
    rotary max_length min_length do_sample num_beams temperature top_k top_p n_special
    predict_special_tokens
    '''.split())


class Settings:
  """The settings of one `config.json`, each read at most under its several names.

  Args:
    values: the parsed file.
    where: how to call it in errors.
  """

  def __init__(self, values: Mapping[str, Any], where: str = 'config.json'):
    self.values, self.where = dict(values), where
    self.read: set[str] = set()

  def get(self, *names: str, default: Any = _REQUIRED) -> Any:
    """The first of the names that is set to anything but null.

    Args:
      *names: current spelling first, older ones after it.
      default: where none is; without it the setting is required.
    Raises:
      ValueError: a required setting is absent.
    """
    self.read.update(names)
    for name in names:
      if self.values.get(name) is not None:
        return self.values[name]
    if default is _REQUIRED:
      raise ValueError(f'{self.where} lacks {" or ".join(map(repr, names))}')
    return default

  def only(self, name: str, *allowed: Any, default: Any) -> None:
    """Refuses a setting whose other values would change the model in a way we do not have.

    Args:
      name: of the setting.
      *allowed: its values that change nothing.
      default: what its absence means.
    """
    value = self.get(name, default=default)
    if value not in allowed:
      raise ValueError(f'{self.where}: {name}={value!r} is not supported; supported: '
                       f'{", ".join(map(repr, allowed))}')

  def activation(self, *names: str, default: Any = _REQUIRED) -> Any:
    """Our name of an activation function."""
    found = self.get(*names, default=default)
    if found not in ACTIVATIONS:
      raise ValueError(f'{self.where}: activation {found!r} is not supported; supported: '
                       f'{", ".join(sorted(ACTIVATIONS))}')
    return ACTIVATIONS[found]

  def choice(self, name: str, *, default: bool, yes: T, no: T) -> T:
    """One of two of our values, by a boolean of theirs."""
    return yes if self.get(name, default=default) else no

  def embeddings(self, *, default: bool) -> Literal['tied', 'untied']:
    """Whether the head shares the input table."""
    return self.choice('tie_word_embeddings', default=default, yes='tied', no='untied')

  def rope(self, *, head_dim: int, max_length: int, kind: str = '', theta: float = 10000.0,
           fraction: float = 1.0) -> dict[str, Any]:
    """Our rotary settings.

    Args:
      head_dim: width of a head.
      max_length: longest row.
      kind: layer type whose settings are wanted, where there are several.
      theta: base where none is given.
      fraction: of rotating dimensions, where none is given.
    Returns:
      rope_theta, rope_fraction and rope_scaling for `DecoderConfig`.
    """
    found = dict(self.get('rope_parameters', default=None) or {})
    if kind and isinstance(found.get(kind), Mapping):
      found = dict(found[kind])
    found = found or dict(self.get('rope_scaling', default=None) or {})
    theta = found.get('rope_theta') or self.get('rope_theta', 'rotary_emb_base', default=theta)
    share = found.get('partial_rotary_factor')
    fraction = share if share is not None else self.get('partial_rotary_factor', 'rotary_pct',
                                                        default=fraction)
    return {'rope_theta': float(theta), 'rope_fraction': float(fraction),
            'rope_scaling': self._scaling(found, max_length)}

  def _scaling(self, found: dict[str, Any], max_length: int) -> RopeScaling | None:
    self.read.add('original_max_position_embeddings')
    kind = found.get('rope_type', found.get('type', 'default'))
    if kind == 'default':
      return None
    # Phi-3's first files call it 'su'.
    kind = {'su': 'longrope'}.get(kind, kind)
    original = found.get('original_max_position_embeddings') or self.get(
        'original_max_position_embeddings', default=max_length)
    factor = found.get('factor')
    if kind in ('linear', 'dynamic'):
      # The dynamic base grows from the longest row the file states.
      return RopeScaling(kind=kind, factor=float(factor or 1.0),
                         original_length=max_length if kind == 'dynamic' else None)
    if kind == 'llama3':
      return RopeScaling(kind=kind, factor=float(factor or 1.0), original_length=original,
                         low_frequency=float(found['low_freq_factor']),
                         high_frequency=float(found['high_freq_factor']))
    if kind == 'yarn':
      return self._yarn(found, original, max_length)
    if kind == 'longrope':
      grown = factor or max_length / original
      sharper = found.get('attention_factor') or (
          1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(original)))
      return RopeScaling(kind=kind, factor=float(grown), original_length=original,
                         short_factors=tuple(found['short_factor']),
                         long_factors=tuple(found['long_factor']), attention_factor=sharper)
    raise ValueError(f'{self.where}: rope type {kind!r} is not supported; supported: default, '
                     f'linear, dynamic, llama3, yarn, longrope')

  def _yarn(self, found: dict[str, Any], original: int, max_length: int) -> RopeScaling:
    factor = float(found.get('factor') or max_length / original)
    grow = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
    sharper = found.get('attention_factor')
    if sharper is None:
      top, bottom = found.get('mscale'), found.get('mscale_all_dim')
      sharper = grow(top) / grow(bottom) if top and bottom else grow(1)
    return RopeScaling(kind='yarn', factor=factor, original_length=original,
                       beta_fast=float(found.get('beta_fast') or 32),
                       beta_slow=float(found.get('beta_slow') or 1),
                       truncate='ends' if found.get('truncate', True) else 'none',
                       attention_factor=float(sharper))

  def windows(self, *, layers: int, default: str = 'global', used: bool = True) -> dict[str, Any]:
    """Our window and pattern.

    Args:
      layers: number of layers.
      default: kind of every layer where none is given.
      used: whether the file says that its window holds.
    """
    window = self.get('sliding_window', default=None)
    window = window if used else None
    kinds = self.get('layer_types', default=None)
    if window is None:
      return {}
    if kinds is None:
      return {'window': window, 'pattern': (default,)} if default == 'local' else {}
    ours = {'sliding_attention': 'local', 'full_attention': 'global'}
    unknown = sorted(set(kinds) - ours.keys())
    if unknown or len(kinds) != layers:
      raise ValueError(f'{self.where}: layer_types must name {layers} layers, each one of '
                       f'{", ".join(ours)}; got {kinds}')
    pattern = shortest([ours[k] for k in kinds])
    return {'window': window, 'pattern': pattern} if 'local' in pattern else {}

  def unread(self) -> list[str]:
    """Settings nobody asked for that are not known to be harmless."""
    return sorted(self.values.keys() - self.read - HARMLESS)


def shortest(kinds: list[Any]) -> tuple[Any, ...]:
  """The shortest beginning whose repetition gives the list."""
  for count in range(1, len(kinds)):
    if all(kind == kinds[i % count] for i, kind in enumerate(kinds)):
      return tuple(kinds[:count])
  return tuple(kinds)
