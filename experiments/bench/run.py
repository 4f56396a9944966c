"""Measures this machine, the training step, the loop, the start, the data, imports and exports.

Prints a table while it measures, as ./scripts/bench does. Sections run in this order, each alone
if asked for.
"""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Sequence

from experiments.bench import report as report_lib
from t5x_like import failures, ginfiles, names

# Imported when its turn comes: flags are answered at once, and no section pays for another.
SECTIONS = {
  'startup': 'startup.measure',
  'data': 'data.measure',
  'import': 'interchange.measure',
  'export': 'interchange.measure_export',
  'step': 'speed.measure_step',
  'loop': 'speed.measure_loop',
  'torch': 'torch_side.measure',
}
_DTYPES = ('float32', 'bfloat16')


class _Parser(argparse.ArgumentParser):
  """Names the nearest option when one does not exist."""

  def parse_args(self, args=None, namespace=None):  # pyright: ignore
    found, unknown = self.parse_known_args(args, namespace)
    if unknown:
      options = [o for action in self._actions for o in action.option_strings]
      self.error(f"unknown option '{unknown[0]}'{names.suggest(unknown[0], options)}")
    return found


def _several(text: str, allowed: Sequence[str]) -> tuple[str, ...]:
  chosen = [part.strip() for part in text.split(',')]
  for name in chosen:
    if name not in allowed:
      raise argparse.ArgumentTypeError(
        f"'{name}' is none of {', '.join(allowed)}{names.suggest(name, allowed)}")
  return tuple(name for name in allowed if name in chosen)


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
  return int(text)


def _model(text: str) -> str:
  known = {path.stem for path in (ginfiles.packaged() / 'models').glob('*.gin')} - {'decoder'}
  if text not in known:
    raise argparse.ArgumentTypeError(f"'{text}' is no file in gin/models"
                                     f"{names.suggest(text, known)}")
  return text


def _out(text: str) -> str:
  folder = os.path.dirname(os.path.abspath(text))
  if os.path.isdir(text) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise argparse.ArgumentTypeError(f"'{text}' cannot be written: give a file in a folder that "
                                     f"exists")
  return os.path.abspath(text)


def _interpreter(text: str) -> str:
  found = shutil.which(text)
  if found is None:
    raise argparse.ArgumentTypeError(f"'{text}' is no program that can be run")
  return found


def parse(argv: Sequence[str]) -> tuple[report_lib.Settings, str | None]:
  """Reads the command line.

  Args:
    argv: without the program's name.

  Returns:
    What to measure, and the JSON file to write.

  Raises:
    SystemExit: with status 2 and a message for what is not an option, 0 after --help.
  """
  parser = _Parser(prog='./scripts/bench', description=__doc__, allow_abbrev=False)
  parser.add_argument('--only', type=lambda t: _several(t, list(SECTIONS)),
                      default=tuple(SECTIONS), metavar='A,B', help=f'of {", ".join(SECTIONS)}')
  parser.add_argument('--out', type=_out, metavar='FILE', help='also write the numbers as JSON')
  parser.add_argument('--quick', action='store_true',
                      help='a few steps of everything: shows that it runs, measures nothing')
  parser.add_argument('--model', type=_model, default='bench', metavar='NAME',
                      help='a file in gin/models (default: bench)')
  parser.add_argument('--batch_size', type=_positive, default=8, metavar='N')
  parser.add_argument('--length', type=_positive, default=256, metavar='N')
  parser.add_argument('--vocab', type=_positive, default=512, metavar='N')
  parser.add_argument('--dtypes', type=lambda t: _several(t, _DTYPES), default=_DTYPES,
                      metavar='A,B', help=f'of {", ".join(_DTYPES)}')
  parser.add_argument('--torch_python', type=_interpreter, metavar='PYTHON',
                      help='an interpreter that has torch, for the section torch')
  given = parser.parse_args(argv)
  if given.vocab < 8:
    parser.error(f'argument --vocab: {given.vocab} is too few, 8 or more are needed')
  settings = report_lib.Settings(
    only=given.only, model=given.model, batch_size=given.batch_size, length=given.length,
    vocab=given.vocab, dtypes=given.dtypes, effort='quick' if given.quick else 'full',
    torch_python=given.torch_python)
  return settings, given.out


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns the exit status."""
  settings, out = parse(sys.argv[1:] if argv is None else argv)
  # A reference in another process needs memory on the same device.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  report = report_lib.Report(settings, path=out)
  try:
    for target in ('machine.measure', *(SECTIONS[name] for name in settings.only)):
      module, _, function = target.partition('.')
      found = importlib.import_module(f'experiments.bench.{module}')
      getattr(found, function)(report, settings)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  except Exception as error:
    return failures.report(error, show='short', ours=frozenset({'experiments', 't5x_like', 'models',
                                                                'partitioning'}))
  finally:
    report.save()
  return 0


if __name__ == '__main__':
  sys.exit(main())
