"""Writes a model definition as a gin file that training, evaluation and generation read."""

import collections
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any


def text(model: Any, *, about: str) -> str:
  """A gin file that binds MODEL to this definition.

  Args:
    model: a dataclass whose fields are literals or dataclasses of such, as `DecoderLM`.
    about: one line saying what it is.
  """
  counts = collections.Counter(type(one) for one in _dataclasses(model))
  lines = list(_bindings(model, counts, scope=''))
  modules = sorted({kind.__module__ for kind in counts})
  imports = [f'from {m.rpartition(".")[0]} import {m.rpartition(".")[2]}' for m in modules]
  if any(line.endswith(' = %VOCAB_SIZE') for line in lines):
    sizes = [one.vocab for one in _dataclasses(model) if 'vocab' in _fields(one)]
    lines.insert(0, f'VOCAB_SIZE = {sizes[0]}')
  return '\n'.join([f'# {about}', 'from __gin__ import dynamic_registration', *imports, '',
                    f'MODEL = @{_name(model)}()', *lines, ''])


def _fields(value: Any) -> set[str]:
  return {field.name for field in dataclasses.fields(value)}


def _dataclasses(value: Any) -> Iterator[Any]:
  if dataclasses.is_dataclass(value):
    yield value
    for field in dataclasses.fields(value):
      yield from _dataclasses(getattr(value, field.name))


def _bindings(value: Any, counts: collections.Counter, *, scope: str) -> Iterator[str]:
  """One line for each field that is not at its default."""
  known = inspect.signature(type(value)).parameters
  for field in dataclasses.fields(value):
    found = getattr(value, field.name)
    if field.name not in known or found == field.default:
      continue
    where = f'{scope}{_name(value)}.{field.name}'
    if dataclasses.is_dataclass(found):
      # Two of a kind are told apart by the names of the fields they are in.
      inner = f'{scope}{field.name}/' if counts[type(found)] > 1 else scope
      yield f'{where} = @{inner}{_name(found)}()'
      yield from _bindings(found, counts, scope=inner)
    elif field.name == 'vocab' and not scope:
      yield f'{where} = %VOCAB_SIZE'
    else:
      yield f'{where} = {found!r}'


def _name(value: Any) -> str:
  kind = type(value)
  return f'{kind.__module__.rpartition(".")[2]}.{kind.__qualname__}'
