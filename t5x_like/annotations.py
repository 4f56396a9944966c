"""Whether a value given in a gin file fits the annotation of the parameter it goes to."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Answer = Literal['yes', 'no', 'unknown']
_PLAIN = (int, float, str, bool, bytes, list, tuple, dict, set, type(None))


class Built(NamedTuple):
  """Stands for the object that a reference `@name()` will build, and what is known of its type."""

  name: str
  type: Any = inspect.Parameter.empty

  def __repr__(self) -> str:
    return f'@{self.name}()'


class Unbuilt(NamedTuple):
  """Stands for a reference `@name`: the function or class itself, not called."""

  name: str
  target: Any

  def __repr__(self) -> str:
    return f'@{self.name}'


def hints(function: Callable[..., Any]) -> dict[str, Any]:
  """Returns the annotations of a function's or class's parameters, {} where they cannot be read."""
  try:
    if inspect.isclass(function):
      init = function.__init__ if '__init__' in _owner(function) else function.__new__
      return {**typing.get_type_hints(init, include_extras=True)}
    return typing.get_type_hints(function, include_extras=True)
  except Exception:  # An annotation may name what exists only while type checking.
    return {}


def _owner(cls: type) -> dict[str, Any]:
  for base in cls.__mro__:
    if '__init__' in base.__dict__ or '__new__' in base.__dict__:
      return dict(base.__dict__)
  return {}


def describe(annotation: Any) -> str:
  """Returns an annotation as a user would write it."""
  if typing.get_origin(annotation) is Literal:
    return 'one of ' + ', '.join(repr(a) for a in typing.get_args(annotation))
  if isinstance(annotation, type) and not typing.get_args(annotation):
    return annotation.__name__
  return str(annotation).replace('typing.', '').replace('collections.abc.', '')


def fits(value: Any, annotation: Any) -> Answer:
  """Says whether a value may be passed where an annotation stands.

  `unknown` lets it pass: protocols, array types, type variables and whatever a reference builds are
  left to the code itself. An int fits a float; a bool fits neither.

  Args:
    value: a literal, or `Built` / `Unbuilt` where the gin file has a reference.
    annotation: the evaluated annotation.
  """
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any or annotation is object or annotation is inspect.Parameter.empty:
    return 'yes'
  if origin is typing.Annotated:
    return fits(value, args[0])
  if isinstance(annotation, typing.NewType):
    return fits(value, annotation.__supertype__)
  if origin in (typing.Union, types.UnionType):
    answers = [fits(value, a) for a in args]
    return 'yes' if 'yes' in answers else 'unknown' if 'unknown' in answers else 'no'
  if isinstance(value, Built):
    return _built_fits(value, annotation)
  if isinstance(value, Unbuilt):
    return _unbuilt_fits(value, annotation, origin)
  if origin is Literal:
    return _any_of([type(value) is type(a) and value == a for a in args])
  if annotation is None:
    return _any_of([value is None])
  if origin in (collections.abc.Callable, type) or annotation in (Callable, type):
    return 'no' if isinstance(value, _PLAIN) else 'unknown'
  try:
    return _class_fits(value, origin or annotation, args)
  except TypeError:  # Not a class: a type variable, a forward reference, a protocol.
    return 'unknown'


def returned(function: Any) -> Any:
  """Returns the annotated type of what a call gives, `inspect.Parameter.empty` where unknown."""
  if inspect.isclass(function):
    return function
  return hints(function).get('return', inspect.Parameter.empty)


def _built_fits(value: Built, annotation: Any) -> Answer:
  """Only numbers, texts and None are told apart; what builds them must be annotated to say so."""
  if annotation not in (int, float, str, bool, None, type(None)):
    return 'unknown'
  return _any_of([value.type is annotation or (annotation is float and value.type is int)])


def _any_of(answers: list[bool]) -> Answer:
  return 'yes' if any(answers) else 'no'


def _unbuilt_fits(value: Unbuilt, annotation: Any, origin: Any) -> Answer:
  if annotation in (int, float, str, bool, list, tuple, dict, type(None)):
    return 'no'
  if origin is type and inspect.isclass(value.target):
    return 'unknown'
  plain = inspect.isclass(annotation) and not getattr(annotation, '_is_protocol', False)
  module = getattr(annotation, '__module__', '')
  if plain and module not in ('builtins', 'collections.abc', 'typing', 'jaxtyping'):
    return 'unknown' if any('__call__' in base.__dict__ for base in annotation.__mro__) else 'no'
  return 'unknown'


def _class_fits(value: Any, cls: Any, args: tuple[Any, ...]) -> Answer:
  if cls in (int, float) and isinstance(value, bool):
    return 'no'
  if cls is float and isinstance(value, int):
    return 'yes'
  if getattr(cls, '_is_protocol', False) and cls.__module__ not in ('typing', 'collections.abc'):
    return 'unknown'
  if not isinstance(cls, type) or cls.__module__.startswith('jaxtyping'):
    return 'unknown'
  if not isinstance(value, cls):
    return 'no'
  if cls is not str and isinstance(value, str):  # A str is a Sequence, hardly ever what is meant.
    return 'no' if issubclass(str, cls) and cls is not object else 'yes'
  return _contents_fit(value, args)


def _contents_fit(value: Any, args: tuple[Any, ...]) -> Answer:
  if not args:
    return 'yes'
  if isinstance(value, dict) and len(args) == 2:
    pairs = [(k, args[0]) for k in value] + [(v, args[1]) for v in value.values()]
  elif isinstance(value, tuple) and args[-1] is not Ellipsis and len(args) != 1:
    if len(value) != len(args):
      return 'no'
    pairs = list(zip(value, args, strict=True))
  elif isinstance(value, (list, tuple, set)):
    pairs = [(v, args[0]) for v in value]
  else:
    return 'unknown'
  answers = [fits(v, a) for v, a in pairs]
  return 'no' if 'no' in answers else 'unknown' if 'unknown' in answers else 'yes'


def choices(annotation: Any) -> list[str]:
  """Returns the texts that an annotation lists, [] if it lists none."""
  args = typing.get_args(annotation)
  if typing.get_origin(annotation) is Literal:
    return [a for a in args if isinstance(a, str)]
  return [c for a in args for c in choices(a)]
