"""What a family is: how its `config.json` reads, how it is written, and its name table."""

import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from models import hf
from models.config import DecoderConfig
from models.hf import table
from models.hf.files import Stored
from models.hf.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One family of models in Hugging Face format.

  Attributes:
    name: what users call it.
    model_types: `model_type` of its config.json; the first one is written.
    architecture: class of `transformers` that an export is loaded by.
    read: settings to our configuration.
    write: our configuration to settings, in the current spelling; what it cannot say is a
      ValueError.
    rows: name table of a configuration.
    model: configuration to model definition.
    older: the current spelling of its settings to the older one.
    renames: (regex, replacement) applied to names in a file, for older and foreign spellings.
    ignored: regexes of tensors that hold nothing learned; tried after the renames.
    layouts: other name tables that files are read by, where their names are in the file.
    constants: tensors an export has that hold nothing learned, by name.
    spare: tensors that nothing is computed with where another one is in the file, and that one.
    settle: (settings, tensors of the file) to the settings that the tensors decide: they replace
      those of the file.
    architectures: `architecture` of the model types that have another one.
  """

  name: str
  model_types: tuple[str, ...]
  architecture: str
  read: Callable[[Settings], Any]
  write: Callable[[Any], dict[str, Any]]
  rows: Callable[[Any], Sequence[table.Row]]
  model: Callable[..., Any]
  older: Callable[[dict[str, Any]], dict[str, Any]] = dict
  renames: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()
  layouts: tuple[Callable[[Any], Sequence[table.Row]], ...] = ()
  constants: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
  spare: Mapping[str, str] = dataclasses.field(default_factory=dict)
  settle: Callable[[Mapping[str, Any], Mapping[str, Stored]], dict[str, Any]] = (
      lambda values, stored: {})
  architectures: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def canonical(self, name: str) -> str | None:
    """The table's spelling of a tensor's name; None if it holds nothing learned."""
    for pattern, replacement in self.renames:
      name = re.sub(pattern, replacement, name)
    return None if any(re.search(pattern, name) for pattern in self.ignored) else name

  def layout(self, config: Any, names: Iterable[str]) -> Sequence[table.Row]:
    """The name table of a file: of `rows` and `layouts`, the one that most of its names fit.

    Args:
      config: ours.
      names: of the file's tensors.
    """
    known = {self.canonical(name) for name in names}

    def fits(rows: Sequence[table.Row]) -> float:
      first = (row.theirs.format(layer=row.first, expert=0) for row in rows)
      return sum(name in known for name in first) / len(rows)

    return max((rows(config) for rows in (self.rows, *self.layouts)), key=fits)


_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> Family:
  """Adds a family, replacing one of the same name.

  Args:
    family: yours.
  Returns:
    The same.
  """
  _REGISTERED[family.name] = family
  return family


def families() -> dict[str, Family]:
  """All families by name: ours, and those registered."""
  # Imported when first asked for, so that a training run pays nothing for them.
  for module in pkgutil.iter_modules(hf.__path__):
    found = importlib.import_module(f'models.hf.{module.name}')
    for family in getattr(found, 'FAMILIES', ()):
      _REGISTERED.setdefault(family.name, family)
  return dict(_REGISTERED)


def of_settings(values: Mapping[str, Any], where: str = 'config.json') -> Family:
  """The family of a parsed `config.json`.

  Args:
    values: the parsed file.
    where: how to call it in errors.
  Raises:
    ValueError: no family has its `model_type`, naming the nearest.
  """
  known = {kind: family for family in families().values() for kind in family.model_types}
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in known:
    near = difflib.get_close_matches(str(kind), known, 1)
    raise ValueError(f'{where}: model_type {kind!r} is unknown'
                     + (f'; did you mean {near[0]!r}?' if near else '')
                     + f' Known: {", ".join(sorted(known))}; docs/families.md says how to add one')
  return known[kind]


def of_config(config: Any) -> list[Family]:
  """The families that can express a configuration, without loss.

  Args:
    config: one of ours.
  Returns:
    Those whose reading of what they write is the same configuration again; their order is that
    of their names.
  """
  found = []
  for family in sorted(families().values(), key=lambda f: f.name):
    try:
      again = family.read(Settings({'model_type': family.model_types[0], **family.write(config)}))
    except (ValueError, AttributeError, TypeError):
      continue
    if structure(again) == structure(config):
      found.append(family)
  return found


def structure(config: Any) -> Any:
  """A configuration with the settings that no file of theirs knows at their defaults.

  What None stands for is written out, so that it equals the same said in numbers.
  """
  ours = {'layer_loop', 'remat', 'dtype', 'kernel', 'dropout', 'expert_capacity'}
  defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in ours}
  nested = {f.name: structure(getattr(config, f.name)) for f in dataclasses.fields(config)
            if f.name in ('encoder', 'decoder', 'stack')
            and dataclasses.is_dataclass(getattr(config, f.name))}
  if isinstance(config, DecoderConfig):
    width, scale = config.width_of_head, config.attention_scale
    defaults |= {'head_dim': width, 'kv_heads': config.num_kv_heads, 'out_vocab': config.head_vocab,
                 'attention_scale': width**-0.5 if scale is None else scale}
  return dataclasses.replace(config, **defaults, **nested)
