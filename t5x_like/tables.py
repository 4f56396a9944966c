"""Text for people: aligned tables, counts, durations."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
  """Aligns columns of text.

  Args:
    header: column titles.
    rows: cells, one sequence per row.
    align: one letter per column, 'l' or 'r'.

  Returns:
    The table, without a final newline.

  Raises:
    ValueError: if a row or `align` has another number of columns than the header.
  """
  for row in [align, *rows]:
    if len(row) != len(header):
      raise ValueError(f'{len(row)} columns in {row!r} under the {len(header)} of {list(header)}')
  cells = [list(header), *[list(row) for row in rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = []
  for row in cells:
    padded = [c.rjust(w) if a == 'r' else c.ljust(w)
              for c, w, a in zip(row, widths, align, strict=True)]
    lines.append('  '.join(padded).rstrip())
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
  """Writes a Markdown table.

  Args:
    header: column titles.
    rows: cells, one sequence per row.
    align: one letter per column, 'l' or 'r'.

  Returns:
    The table, without a final newline.
  """
  rules = ['---:' if a == 'r' else '---' for a in align]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [list(header), rules, *rows])


def parameter_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays out the parameters of a model, with totals.

  Args:
    rows: per parameter: 'path' (str), 'shape' (sequence of int), 'axes' (logical axis names, or
      None), 'spec' (partition spec, anything printable), 'dtype', and optionally 'count' (int,
      default the product of the shape).

  Returns:
    A table of path, shape, logical axes, spec, dtype, count, and a line with the totals, bytes
    counted unsharded.
  """
  lines, total, size = [], 0, 0
  for row in rows:
    shape = tuple(row['shape'])
    product = 1
    for dim in shape:
      product *= dim
    count = int(row.get('count', product))
    total += count
    size += count * _item_bytes(row['dtype'])
    axes = ', '.join(str(axis) for axis in row['axes'] or ())
    lines.append([str(row['path']), ' x '.join(map(str, shape)) or 'scalar', axes,
                  str(row['spec']), _dtype_name(row['dtype']), f'{count:,}'])
  lines.append([f'total: {len(rows):,} parameter arrays', '', '', '', bytes_text(size),
                f'{total:,}'])
  header = ('path', 'shape', 'logical axes', 'spec', 'dtype', 'count')
  return text_table(header, lines, align='lllllr')


def _dtype_name(dtype: Any) -> str:
  return getattr(dtype, 'name', None) or getattr(dtype, '__name__', None) or str(dtype)


def _item_bytes(dtype: Any) -> int:
  size = getattr(dtype, 'itemsize', None)
  if isinstance(size, int):
    return size
  digits = ''.join(filter(str.isdigit, _dtype_name(dtype).split('_')[0].split('e')[0]))
  return max(1, int(digits or 8) // 8)


def count_text(number: float) -> str:
  """Shortens a count.

  Args:
    number: for example 12345.

  Returns:
    Three significant digits and a unit, for example '12.3k'.
  """
  for limit, unit in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(number) >= limit * 0.9995:
      return f'{_three_digits(number / limit)}{unit}'
  return _three_digits(number)


def _three_digits(value: float) -> str:
  if abs(value) >= 99.95:
    return f'{value:.0f}'
  return f'{value:.1f}' if abs(value) >= 9.995 else f'{value:.3g}'


def bytes_text(number: float) -> str:
  """Writes a number of bytes with a binary unit.

  Args:
    number: bytes.

  Returns:
    For example '13.2 MiB'.
  """
  for power, unit in ((4, 'TiB'), (3, 'GiB'), (2, 'MiB'), (1, 'KiB')):
    if abs(number) >= 1024 ** power:
      return f'{number / 1024 ** power:.1f} {unit}'
  return f'{number:.0f} B'


def duration_text(seconds: float) -> str:
  """Writes a duration as h:mm:ss.

  Args:
    seconds: >= 0.

  Returns:
    For example '0:02:05', or '3 d 0:02:05'.
  """
  whole = int(seconds + 0.5)
  days, rest = divmod(whole, 86400)
  text = f'{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}'
  return f'{days} d {text}' if days else text
