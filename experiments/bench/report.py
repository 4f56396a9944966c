"""The table the benchmark prints while it measures, and the same numbers as JSON."""

import dataclasses
import json
import os
import sys
from typing import Any, TextIO

_NAME, _VALUE = 46, 12


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the benchmark was asked to measure.

  Attributes:
    only: sections, in the order they run.
    model: name of a file in gin/models, without its ending.
    batch_size: rows per update.
    length: tokens per row.
    vocab: token ids are below this.
    dtypes: compute dtypes of the model.
    effort: 'quick' shows that everything runs, 'full' measures.
    torch_python: interpreter to run the PyTorch reference with; None skips it.
  """

  only: tuple[str, ...]
  model: str
  batch_size: int
  length: int
  vocab: int
  dtypes: tuple[str, ...]
  effort: str
  torch_python: str | None

  def scaled(self, full: int, quick: int) -> int:
    """Returns how often to do something at the chosen effort."""
    return full if self.effort == 'full' else quick


class Report:
  """Prints each row once it is measured and keeps it.

  Args:
    settings: of this run; part of the JSON.
    path: JSON file, rewritten whole after each section; None writes none.
    stream: default stdout; progress goes to stderr.
  """

  def __init__(self, settings: Settings, *, path: str | None = None, stream: TextIO | None = None):
    self._stream = stream or sys.stdout
    # In a terminal, what is being measured is overwritten by the row it becomes.
    self._terminal = sys.stderr.isatty()
    self._path = path
    self._rows: list[dict[str, Any]] = []
    self._section = ''
    self._settings = settings

  def section(self, name: str, *, about: str) -> None:
    """Begins a section of the table.

    Args:
      name: as given to --only.
      about: what is measured, in one line.
    """
    self.save()
    self._section = name
    self._print(f'\n{name}: {about}')

  def add(self, name: str, value: float | int | str, unit: str = '', *, note: str = '') -> None:
    """Adds a row.

    Args:
      name: what was measured; unique in its section.
      value: number or text.
      unit: of a number.
      note: how it was measured, where the name does not say it.
    """
    self._rows.append({'section': self._section, 'name': name, 'value': value, 'unit': unit,
                       'note': note})
    shown = value if isinstance(value, str) else _number(value)
    self._print(f'  {name:<{_NAME}} {shown:>{_VALUE}} {unit:<8} {note}'.rstrip())

  def note(self, text: str) -> None:
    """Adds a row that only says something, such as why a measurement was left out."""
    self._rows.append({'section': self._section, 'name': 'note', 'value': text, 'unit': '',
                       'note': ''})
    self._print(f'  note: {text}')

  def progress(self, text: str) -> None:
    """Says on stderr what is being measured now."""
    line = f'  ... {text}'
    print(f'\r\033[K{line}' if self._terminal else line, file=sys.stderr, flush=True,
          end='' if self._terminal else '\n')

  def find(self, section: str, name: str) -> Any:
    """Returns the value of a row, None if there is none."""
    return next((row['value'] for row in self._rows
                 if (row['section'], row['name']) == (section, name)), None)

  def save(self) -> None:
    """Writes the JSON file, whole or not at all."""
    if self._path is None:
      return
    content = {'settings': dataclasses.asdict(self._settings), 'rows': self._rows}
    temporary = f'{self._path}.{os.getpid()}.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
      json.dump(content, file, indent=1)
    os.replace(temporary, self._path)

  def _print(self, text: str) -> None:
    if self._terminal:
      print('\r\033[K', file=sys.stderr, flush=True, end='')
    print(text, file=self._stream, flush=True)


def _number(value: float) -> str:
  if isinstance(value, int) or abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.1f}' if abs(value) >= 100 else f'{value:.2f}'
