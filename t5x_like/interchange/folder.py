"""A folder in Hugging Face format: its settings, its family, its tensors, its other files."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any, Literal

from models.hf import family as family_lib
from models.hf import files, table
from models.hf.settings import Settings
from t5x_like.state import Structure

CONFIG = 'config.json'
# What an export needs besides the weights; all of it is small.
KEPT = (CONFIG, 'generation_config.json', 'tokenizer.json', 'tokenizer.model', 'spiece.model',
        'sentencepiece.bpe.model', 'sentencepiece.model', 'vocab.json', 'vocab.txt', 'merges.txt',
        'special_tokens_map.json', 'added_tokens.json', 'tokenizer_config.json',
        'chat_template.jinja', 'chat_template.json')
Unknown = Literal['refuse', 'ignore']


@dataclasses.dataclass(frozen=True)
class Folder:
  """What is known of a folder before a tensor is read.

  Attributes:
    path: of the folder.
    family: by its `model_type`.
    config: ours.
    values: its parsed config.json.
    stored: its tensors by name.
    settled: settings that its tensors decide, in `values` too.
  """

  path: str
  family: family_lib.Family
  config: Any
  values: dict[str, Any]
  stored: dict[str, files.Stored]
  settled: dict[str, Any] = dataclasses.field(default_factory=dict)

  def fingerprint(self, **more: Any) -> str:
    """A hash that changes with the settings, any file's size or time, and anything in `more`."""
    stamps = {}
    for path in sorted({tensor.path for tensor in self.stored.values()}):
      found = os.stat(path)
      stamps[os.path.basename(path)] = [found.st_size, found.st_mtime_ns]
    text = json.dumps([self.values, stamps, more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def keep_files(source: str, target: str) -> None:
  """Copies settings and tokenizer files, whose absence is no error.

  Args:
    source: a folder in Hugging Face format.
    target: made where it is missing.
  """
  os.makedirs(target, exist_ok=True)
  for name in KEPT:
    if os.path.isfile(os.path.join(source, name)):
      shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def discard(work: str, mark: str) -> None:
  """Removes what an interrupted conversion left; a folder of anyone else's is refused.

  Args:
    work: the folder, which need not exist.
    mark: name of the file in it that says that it is ours.
  Raises:
    ValueError: it is not empty, and the file is not there.
  """
  if not os.path.lexists(work):
    return
  there = os.listdir(work) if os.path.isdir(work) else [work]
  if there and mark not in there:
    raise ValueError(f'{work} is needed for what is not finished, but it is there and no '
                     f'conversion left it: move it away, or give another --out')
  for name in there:
    path = os.path.join(work, name)
    if os.path.isdir(path) and not os.path.islink(path):
      shutil.rmtree(path)
    elif name != mark:
      os.remove(path)
  # Last, so that what a kill leaves of this still has it.
  shutil.rmtree(work)


@contextlib.contextmanager
def told(what: str, *, after: str) -> Iterator[None]:
  """Says of an error of the disk what it ended and how to go on.

  Args:
    what: what was being done.
    after: what to do once the disk is mended.
  Raises:
    OSError: instead of those of Python and of TensorStore.
  """
  try:
    yield
  except Exception as error:
    text = ' '.join(str(error).split())
    found = re.search(r'[^:]*(?= \[os_error_code)', text)
    if not isinstance(error, OSError) and found is None:
      raise
    raise OSError(f'{what} ended: {found[0].strip() if found else text}. Mend that, then {after}'
                  ) from None


def others(path: str) -> list[str]:
  """Names of the files, besides config.json, that `keep_files` copies from a folder."""
  return [name for name in KEPT if name != CONFIG and os.path.isfile(os.path.join(path, name))]


def settings(path: str) -> Settings:
  """The settings of a folder.

  Args:
    path: of the folder.
  Raises:
    ValueError: no such folder, no config.json, or one that is not a JSON object.
  """
  where = os.path.join(path, CONFIG)
  try:
    with open(where, encoding='utf-8-sig') as file:
      values = json.load(file)
  except (FileNotFoundError, NotADirectoryError):
    what = f'no {CONFIG} in it' if os.path.isdir(path) else 'no such folder'
    raise ValueError(f'{path}: {what}; give the folder that holds {CONFIG} and the '
                     f'.safetensors files') from None
  except OSError as error:
    raise ValueError(f'{where} cannot be read: {error.strerror}') from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where} is not JSON: {error}') from None
  if not isinstance(values, dict):
    raise ValueError(f'{where} must hold a JSON object, got {type(values).__name__}')
  return Settings(values, where)


def configuration(read: Settings, unknown: Unknown = 'refuse') -> tuple[family_lib.Family, Any]:
  """The family and our configuration of settings.

  Args:
    read: from `settings`.
    unknown: what happens where config.json says something that we do not read: 'refuse', or
      'ignore' it with a note.
  Raises:
    ValueError: no such family, a setting is missing, unsupported or unknown.
  """
  if unknown not in ('refuse', 'ignore'):
    raise ValueError(f"unknown={unknown!r}; allowed: 'refuse', 'ignore'")
  family = family_lib.of_settings(read.values, read.where)
  try:
    config = family.read(read)
  except ValueError as error:
    if read.where in str(error):
      raise
    raise ValueError(f'{read.where}: {error}') from None
  except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
    raise ValueError(f'{read.where}: a setting that a {family.name} needs is missing or of the '
                     f'wrong kind ({type(error).__name__}: {error})') from None
  left = read.unread()
  if left:
    listed = ', '.join(f'{name}={read.said(name)!r}' for name in left)
    if unknown == 'refuse':
      raise ValueError(f'{read.where}: {family.name} does not know {listed}; they may change what '
                       f'the model computes. If they do not, pass --unknown=ignore')
    print(f'note: {read.where}: ignored {listed}', file=sys.stderr)
  return family, config


def load(path: str, unknown: Unknown = 'refuse') -> Folder:
  """Reads everything about a folder but its tensors' values.

  Args:
    path: of the folder.
    unknown: see `configuration`.
  Raises:
    ValueError: what is wrong with the settings or the files.
  """
  path = os.path.abspath(os.path.expanduser(path))
  read = settings(path)
  check_readable(read)
  family, stored = family_lib.of_settings(read.values, read.where), files.tensors(path)
  settled = family.settle(read.values, stored)
  read = Settings({**read.values, **settled}, read.where)
  family, config = configuration(read, unknown)
  stored = whole_names(family, config, stored)
  kinds = {s.dtype for s in stored.values()}
  # Computing follows the file: what was trained in bfloat16 runs in it.
  config = computing_in('bfloat16' if 'BF16' in kinds else 'float32', config)
  return Folder(path, family, config, read.values, stored, settled)


def check_readable(read: Settings) -> None:
  """Refuses settings of weights that no table reads.

  Args:
    read: from `settings`.
  Raises:
    ValueError: the weights are quantised.
  """
  quantised = read.values.get('quantization_config')
  if quantised:
    method = quantised.get('quant_method') if isinstance(quantised, dict) else quantised
    raise ValueError(f'{read.where}: the weights are quantised (quantization_config, method '
                     f'{method!r}), which no table reads; import the model they were made from')


def whole_names(family: family_lib.Family, config: Any, stored: dict[str, files.Stored]
                ) -> dict[str, files.Stored]:
  """Tensors by the names a whole model has, where a model without its head was saved.

  Args:
    family: of the file.
    config: ours.
    stored: by the names in the file.
  """
  first = {row.theirs.format(layer=row.first, expert=0) for row in family.rows(config)}
  tops = [name.partition('.')[0] for name in first]
  top = max(tops, key=tops.count)
  if any((family.canonical(name) or '').startswith(f'{top}.') for name in stored):
    return stored
  whole = {name if name in first else f'{top}.{name}': one for name, one in stored.items()}
  return whole if any(name.startswith(f'{top}.') for name in whole.keys() & first) else stored


def computing_in(dtype: str, config: Any) -> Any:
  """A configuration, and those inside it, with another dtype of activations."""
  changed = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name == 'dtype':
      changed[field.name] = dtype
    elif dataclasses.is_dataclass(value):
      changed[field.name] = computing_in(dtype, value)
  return dataclasses.replace(config, **changed)


def leaves(structure: Structure) -> dict[str, table.Leaf]:
  """Our parameters as a name table sees them."""
  return {row['path']: table.Leaf(row['axes'], row['shape']) for row in structure.rows()}
