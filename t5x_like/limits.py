"""How many positions a model has: what cannot be exceeded, and what merely was not planned for."""

from typing import Any


def positions(model: Any) -> int | None:
  """Returns how many positions a model knows, None where it can go on for ever.

  Args:
    model: the model definition; one without a `config` that says otherwise has no limit.
  """
  config: Any = getattr(model, 'config', None)
  return config.max_length if getattr(config, 'position', None) == 'learned' else None


def check(model: Any, *, prompt: int, new_tokens: int) -> None:
  """Raises ValueError if a prompt and what is to follow it exceed the model's positions.

  Args:
    model: the model definition.
    prompt: ids of the longest prompt, its begin id included.
    new_tokens: to be added to it.
  """
  limit = positions(model)
  if limit is not None and prompt + new_tokens > limit:
    room = limit - prompt
    fix = (f'ask for at most {room} new tokens' if room > 0 else
           f'shorten the prompt to at most {limit - 1} ids')
    raise ValueError(f'a prompt of {prompt} ids (the begin id included) and {new_tokens} new '
                     f'tokens exceed the {limit} learned positions of the model (max_length): '
                     f'{fix}')


def notes(model: Any, *, length: int) -> list[str]:
  """Returns what to tell a user who trains on rows of a length.

  Args:
    model: the model definition.
    length: tokens per row.
  """
  limit = getattr(getattr(model, 'config', None), 'max_length', None)
  if limit is None or positions(model) is not None or length <= limit:
    return []
  return [f'rows of {length} tokens are longer than max_length={limit}; the model reads them, '
          f'since its positions have no end, but set max_length to what it is meant for']
