"""Reads a `config.json` in its current and its older spelling, and says what nobody read."""

import math
from collections.abc import Mapping, Sequence
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
    embedding_fraction reorder_and_upcast_attn router_aux_loss_coef
    router_jitter_noise tie_encoder_decoder pruned_heads use_bfloat16 verbose cache_implementation
    rotary max_length min_length do_sample num_beams temperature top_k top_p n_special
    predict_special_tokens repetition_penalty length_penalty diversity_penalty num_beam_groups
    num_return_sequences no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids typical_p
    forced_bos_token_id forced_eos_token_id early_stopping remove_invalid_values output_scores
    suppress_tokens begin_suppress_tokens exponential_decay_length_penalty tf_legacy_loss
    tokenizer_name
    '''.split())
# What a rotation may say; each kind reads those it has, as the reference does.
_ROTATION = frozenset('''
    rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
    attention_factor beta_fast beta_slow short_factor long_factor low_freq_factor high_freq_factor
    mscale mscale_all_dim truncate finetuned
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
    self.assumed: dict[str, Any] = {}
    self._inner: dict[str, Settings] = {}

  def assume(self, **values: Any) -> None:
    """The family's published defaults: what a name means that is absent, rather than null.

    Args:
      **values: by the current spelling; they come before the `default` of `get`.
    """
    self.assumed |= values

  def get(self, *names: str, default: Any = _REQUIRED) -> Any:
    """The first of the names that is set to anything but null.

    Args:
      *names: current spelling first, older ones after it.
      default: where none is and none is assumed; without it the setting is required.
    Raises:
      ValueError: a required setting is absent.
    """
    self.read.update(names)
    for name in names:
      if self.values.get(name) is not None:
        return self.values[name]
    if names[0] in self.assumed and not any(name in self.values for name in names):
      return self.assumed[names[0]]
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

  def inside(self, name: str, values: Mapping[str, Any] | None = None) -> 'Settings':
    """The settings of a nested table, whose unread names are ours too.

    Args:
      name: of the table; where it is absent or null, it is empty.
      values: in place of what the file has.
    """
    found = self.get(name, default=None) if values is None else values
    self._inner[name] = Settings(found or {}, f'{self.where}: {name}')
    return self._inner[name]

  def rope(self, *, max_length: int, theta: float = 10000.0, fraction: float | None = None,
           kind: str = '', older: Sequence[str] = ('rope_theta', 'partial_rotary_factor')
           ) -> dict[str, Any]:
    """Our rotary settings.

    Args:
      max_length: longest row.
      theta: base where none is given.
      fraction: of rotating dimensions, where none is given; None: this family rotates all, and
        refuses to rotate fewer.
      kind: layer type whose settings are wanted, where there are several.
      older: names of base and fraction outside `rope_parameters`.
    Returns:
      rope_theta, rope_fraction and rope_scaling for `DecoderConfig`.
    """
    stated, scaling = (self.get(name, default=None) or {}
                       for name in ('rope_parameters', 'rope_scaling'))
    if kind:
      kinds = {'sliding_attention', 'full_attention'}
      self.inside('rope_parameters', {n: v for n, v in stated.items() if n not in kinds})
      # The older spelling scales the global layers alone.
      scaling = scaling if kind == 'full_attention' else {}
      found = self.inside(f'rope_parameters.{kind}', {**(stated.get(kind) or {}), **scaling})
    else:
      found = self.inside('rope_parameters', scaling or stated)
    found.read |= _ROTATION
    theta = found.get('rope_theta', default=self.get(older[0], default=theta))
    share = found.get('partial_rotary_factor', default=self.get(
        older[1], default=1.0 if fraction is None else fraction))
    if fraction is None and share != 1:
      raise ValueError(f'{self.where}: partial_rotary_factor={share} is not supported; models of '
                       f'this family rotate all dims')
    outside = None if kind else self.get('original_max_position_embeddings', default=None)
    original = outside or found.get('original_max_position_embeddings', default=max_length)
    return {'rope_theta': float(theta), 'rope_fraction': float(share),
            'rope_scaling': _scaling(found, max_length=max_length, original=original)}

  def windows(self, kinds: Sequence[str], *, layers: int,
              holds: Literal['said', 'never'] = 'said') -> dict[str, Any]:
    """Our window and pattern.

    Args:
      kinds: of the layers: 'sliding_attention' or 'full_attention'.
      layers: number of layers.
      holds: 'never' where the file says that its window is not used.
    """
    window = self.get('sliding_window', default=None)
    if window is None or holds == 'never':
      return {}
    ours = {'sliding_attention': 'local', 'full_attention': 'global'}
    unknown = sorted(set(kinds) - ours.keys())
    if unknown or len(kinds) != layers:
      raise ValueError(f'{self.where}: layer_types must name {layers} layers, each one of '
                       f'{", ".join(ours)}; got {list(kinds)}')
    pattern = shortest([ours[k] for k in kinds])
    return {'window': window, 'pattern': pattern} if 'local' in pattern else {}

  def unread(self) -> list[str]:
    """Settings nobody asked for that are not known to be harmless; 'a.b' is b inside a."""
    return sorted([*(self.values.keys() - self.read - HARMLESS),
                   *(f'{name}.{inner}' for name, table in self._inner.items()
                     for inner in table.values.keys() - table.read)])

  def said(self, name: str) -> Any:
    """What the file says by a name of `unread`."""
    if name in self.values:
      return self.values[name]
    table, _, inner = name.rpartition('.')
    return self._inner[table].values[inner]


def _scaling(found: Settings, *, max_length: int, original: int) -> RopeScaling | None:
  kind = found.get('rope_type', 'type', default='default')
  if kind == 'default':
    return None
  factor = found.get('factor', default=None)
  if kind in ('linear', 'dynamic'):
    # The dynamic base grows from the longest row the file states.
    return RopeScaling(kind=kind, factor=float(factor or 1.0),
                       original_length=max_length if kind == 'dynamic' else None)
  if kind == 'llama3':
    return RopeScaling(kind=kind, factor=float(factor or 1.0), original_length=original,
                       low_frequency=float(found.get('low_freq_factor')),
                       high_frequency=float(found.get('high_freq_factor')))
  if kind == 'yarn':
    return _yarn(found, original, factor=float(factor or max_length / original))
  if kind == 'longrope':
    grown = factor or max_length / original
    sharper = 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(original))
    return RopeScaling(kind=kind, factor=float(grown), original_length=original,
                       short_factors=tuple(found.get('short_factor')),
                       long_factors=tuple(found.get('long_factor')),
                       attention_factor=float(found.get('attention_factor', default=sharper)))
  raise ValueError(f'{found.where}: rope type {kind!r} is not supported; supported: default, '
                   f'linear, dynamic, llama3, yarn, longrope')


def _yarn(found: Settings, original: int, *, factor: float) -> RopeScaling:
  grow = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
  top, bottom = found.get('mscale', default=0), found.get('mscale_all_dim', default=0)
  sharper = grow(top) / grow(bottom) if top and bottom else grow(1)
  return RopeScaling(kind='yarn', factor=factor, original_length=original,
                     beta_fast=float(found.get('beta_fast', default=0) or 32),
                     beta_slow=float(found.get('beta_slow', default=0) or 1),
                     truncate=found.choice('truncate', default=True, yes='ends', no='none'),
                     attention_factor=float(found.get('attention_factor', default=sharper)))


def shortest(kinds: list[Any]) -> tuple[Any, ...]:
  """The shortest beginning whose repetition gives the list."""
  for count in range(1, len(kinds)):
    if all(kind == kinds[i % count] for i, kind in enumerate(kinds)):
      return tuple(kinds[:count])
  return tuple(kinds)
