"""Reports on a finished run: loss curve, held-out bits per byte beside baselines, where time went.

    python -m t5x_like.report --gin_file=my_report.gin

where the gin file imports this module and binds the arguments of `report.report`.
"""

import fnmatch
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like import baselines, config, ledger, metrics, tables
from t5x_like.data import sources as sources_lib

_LABELS = {
  'unigram': 'unigram token model', 'gzip': '`gzip -9`, primed', 'xz': '`xz -9e`, primed',
}
_BLUE, _ORANGE, _GREY = '#1f5fa8', '#d9541e', '#6b7280'


def loss_curve(path: str, *, train: tuple[Sequence[int], Sequence[float]],
               heldout: tuple[Sequence[int], Sequence[float]] = ((), ()),
               levels: Mapping[str, float] | None = None, title: str = '') -> None:
  """Draws training loss and, beside it, held-out bits per byte with baselines.

  Args:
    path: of the PNG.
    train: (steps, loss in nats per token).
    heldout: (steps, bits per byte); may be empty.
    levels: bits per byte by name, drawn as horizontal lines.
    title: above the figure.
  """
  # matplotlib takes half a second to import, and only this function needs it.
  from matplotlib import figure
  figures = 2 if len(heldout[0]) else 1
  width = 5.2 if figures == 1 else 11.2  # Labels stand to the right of the second.
  canvas = figure.Figure(figsize=(width, 3.9), dpi=150, layout='constrained')
  axes = canvas.subplots(1, figures, squeeze=False)[0]
  _draw_train(axes[0], np.asarray(train[0]), np.asarray(train[1], float))
  if figures == 2:
    _draw_heldout(axes[1], heldout, levels or {})
  for axis in axes:
    axis.set_xlabel('step')
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
  if title:
    canvas.suptitle(title, fontsize=11)
  temporary = f'{path}.tmp'
  canvas.savefig(temporary, format='png')
  os.replace(temporary, path)


def _draw_train(axis: Any, steps: np.ndarray, loss: np.ndarray) -> None:
  window = max(1, len(loss) // 50)
  axis.plot(steps, loss, color=_BLUE, alpha=0.3 if window > 1 else 1.0, linewidth=0.9,
            label='each logged step' if window > 1 else None,
            marker='.' if len(loss) < 30 else None)
  if window > 1:
    # A mean over finite neighbours, so that one NaN does not blank the curve around it.
    finite = np.isfinite(loss)
    kernel = np.ones(window)
    sums = np.convolve(np.where(finite, loss, 0.0), kernel, mode='same')
    weights = np.convolve(finite.astype(float), kernel, mode='same')
    axis.plot(steps, sums / np.maximum(weights, 1e-9), color=_BLUE, linewidth=1.6,
              label=f'mean of {window} logged')
    axis.legend(frameon=False, fontsize=8)
  finite = loss[np.isfinite(loss)]
  if len(finite):
    low, high = finite.min(), finite.max()
    margin = 0.05 * max(high - low, 1e-3)
    axis.set_ylim(low - margin, high + margin)
  axis.set_ylabel('training loss (nats per token)')


def _draw_heldout(axis: Any, heldout: tuple[Sequence[int], Sequence[float]],
                  levels: Mapping[str, float]) -> None:
  steps, values = heldout
  axis.plot(steps, values, color=_ORANGE, marker='o', markersize=3.5, linewidth=1.6)
  labels = [(values[-1], f'this model {values[-1]:.3f}', _ORANGE)]
  for name, value in levels.items():
    axis.axhline(value, color=_GREY, linestyle='--', linewidth=0.9)
    labels.append((value, f'{name.replace("`", "")} {value:.3f}', _GREY))
  shown = [v for v in [*values, *levels.values()] if np.isfinite(v)]
  low, high = (0.9 * min(shown), 1.05 * max(shown)) if shown else (0.0, 8.0)
  axis.set_ylim(low, high)
  place = -np.inf
  for value, label, color in sorted(labels):
    place = max(value, place + 0.05 * (high - low))  # Labels of close values must not overlap.
    axis.annotate(label, (1.01, place), xycoords=('axes fraction', 'data'), va='center',
                  fontsize=8, color=color, annotation_clip=False)
  axis.set_ylabel('held-out text (bits per byte)')


def comparison(model: Mapping[str, Any], *, found: Mapping[str, Any]) -> list[list[str]]:
  """Sets the model's bits per byte beside the baselines.

  Args:
    model: 'bits_per_byte' of the evaluation, if there are any.
    found: as from `baselines.measure`.

  Returns:
    Rows of [coder, bits per byte, what the model needs relative to it].
  """
  own = model.get('bits_per_byte')
  rows = [] if own is None else [['**this model**', f'**{own:.4f}**', '']]
  for name, value in found['bits_per_byte'].items():
    share = 0.0 if own is None else 100 * (own / value - 1)
    verdict = f'{abs(share):.1f} % {"fewer" if share < 0 else "more"} bits'
    rows.append([_LABELS[name], f'{value:.4f}', '' if own is None else verdict])
  return rows


def _notes(model: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
  if not found['bits_per_byte']:
    return [f'There are no bits per byte: {found["unknown"]}.']
  mib = tables.bytes_text
  primed, coded = found['train_bytes_primed'], found['heldout_bytes_coded']
  notes = [
    f'Held out: {found["heldout_documents"]:,} documents, {found["heldout_bytes"]:,} bytes, '
    f'{found["heldout_tokens"]:,} tokens. Bits per byte = code length of all their tokens, the end '
    'of each document included, over the bytes of their text.',
    f'Unigram: add-one smoothed frequencies of all {found["train_tokens"]:,} training tokens.',
    'gzip: each document alone, with the last 32 KB of the training text of its source as its '
    'dictionary (all that deflate can look back on), no header counted.',
    f'xz: size(training text + held-out) - size(training text), {mib(primed)} of training text'
    + (f' (evenly spread documents of the {mib(found["train_bytes"])} there are)'
       if primed < 0.99 * found['train_bytes'] else '')
    + '. All held-out documents are one stream, so xz also learns from one for the next.',
  ]
  if len(found['sources']) > 1:
    notes.insert(0, f'The sources {", ".join(found["sources"])} are taken together, whatever their '
                    'rates in training.')
  if found['with_inputs']:
    notes.append('Only targets count, their loss as their bytes. The model has read the inputs '
                 'before them, which the others have not.')
  if coded < 0.99 * found['heldout_bytes']:
    notes.append(f'The compressors coded {mib(coded)} of the held-out text, evenly spread.')
  if found['documents_altered']:
    notes.append(f'**{found["documents_altered"]:,} documents decode to another length than their '
                 'source had (the vocabulary loses something), so the compressors coded a text '
                 'that differs from it.**')
  if model.get('bytes') not in (None, found['heldout_bytes']):
    notes.append(f'**The model was evaluated on {model["bytes"]:,} bytes, not on all '
                 f'{found["heldout_bytes"]:,}: the rows are not on quite the same text.**')
  return notes


def _training_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  steps, losses = metrics.column(records, 'loss')
  rows = [['steps', f'{steps[-1]:,}' if steps else '0'],
          ['last training loss (nats per token)', f'{losses[-1]:.4f}' if losses else '-']]
  for name, label in (('tokens', 'real tokens per step (median)'),
                      ('tokens_per_second', 'tokens/s (median)'), ('mfu', 'MFU (median)')):
    values = [v for v in metrics.column(records, name)[1] if np.isfinite(v)]
    if values:
      value = float(np.median(values))
      rows.append([label, f'{100 * value:.1f} %' if name == 'mfu' else f'{value:,.0f}'])
  return rows


def text(*, model: Mapping[str, Any] | None, found: Mapping[str, Any],
         records: Sequence[Mapping[str, Any]], time: ledger.Summary | None,
         others: Mapping[str, str] | None = None) -> str:
  """Writes the report.

  Args:
    model: the evaluation, or None if there was none.
    found: as from `baselines.measure`.
    records: as from `metrics.read_jsonl`.
    time: the account of the run's time, if kept.
    others: evaluations of other text than this, by name, in words.

  Returns:
    Markdown.
  """
  parts = ['# Report', '', '![loss curve](loss_curve.png)', '']
  if model is None:
    there = '; '.join(others.values()) if others else 'there is no evaluation.json here'
    parts += [f'The model was not evaluated on this held-out text: {there}. Run '
              '`python -m t5x_like.evaluate` first.', '']
  else:
    bits = (f'**{model["bits_per_byte"]:.4f} bits per byte** (loss {model["loss"]:.4f} nats per '
            f'token)' if 'bits_per_byte' in model else
            f'**loss {model["loss"]:.4f} nats per token**')
    parts += [f'Held-out text at step {model["step"]:,}: {bits}.', '']
  rows, notes = comparison(model or {}, found=found), _notes(model or {}, found)
  if rows:
    parts += [tables.markdown_table(('coder', 'bits per byte', 'the model needs'), rows,
                                    align='lrl'), '']
  parts += [*[f'- {note}' for note in notes], '', '## Training', '',
            tables.markdown_table(('', ''), _training_rows(records), align='lr'), '']
  if time is not None:
    parts += ['## Where the time went', '',
              tables.markdown_table(('time', 'seconds', 'share'), time.rows(), align='lrr'), '',
              f'Goodput {100 * time.goodput:.1f} %: productive over wall time and downtime.', '']
  return '\n'.join(parts)


def write(run_dir: str, *, found: Mapping[str, Any], title: str = '') -> dict[str, Any]:
  """Writes loss_curve.png, report.md and report.json into a run directory.

  Args:
    run_dir: with metrics.jsonl, and evaluation.json and ledger.jsonl if there are any. Of several
      evaluations that of the held-out split and sources in `found` is taken.
    found: as from `baselines.measure`.
    title: of the figure.

  Returns:
    What report.json holds.

  Raises:
    ValueError: if there are no metrics, or evaluation.json is damaged.
  """
  records = metrics.read_jsonl(os.path.join(run_dir, 'metrics.jsonl'))
  name, model, others = _heldout(run_dir, found)
  if model is not None and 'unknown' in found:
    model.pop('bits_per_byte', None)
  account = os.path.join(run_dir, 'ledger.jsonl')
  time = ledger.account(ledger.load(account)) if os.path.exists(account) else None
  curves = [name] if model is not None else [
    n for r in records for n in r if n.endswith('bits_per_byte') and n.split('/')[0] not in others]
  steps, values = metrics.column(records, curves[0] if curves else '')
  if 'bits_per_byte' in (model or {}) and model is not None and model['step'] not in steps:
    steps, values = [*steps, model['step']], [*values, model['bits_per_byte']]
  loss_curve(os.path.join(run_dir, 'loss_curve.png'), train=metrics.column(records, 'loss'),
             heldout=(steps, values), title=title,
             levels={_LABELS[name]: value for name, value in found['bits_per_byte'].items()})
  result = {'evaluation': model, 'baselines': dict(found),
            'training': dict(_training_rows(records)),
            'time': time.as_dict() if time else None}
  if model is not None and 'bits_per_byte' in model:
    result['beats'] = {name: model['bits_per_byte'] < value
                       for name, value in found['bits_per_byte'].items()}
  _replace(os.path.join(run_dir, 'report.json'), json.dumps(result, indent=1) + '\n')
  _replace(os.path.join(run_dir, 'report.md'),
           text(model=model, found=found, records=records, time=time, others=others))
  return result


def _heldout(run_dir: str, found: Mapping[str, Any]
             ) -> tuple[str, dict[str, Any] | None, dict[str, str]]:
  """The metric and the evaluation of the held-out text; and of other evaluations what they read."""
  others: dict[str, str] = {}
  files = sorted(f for f in os.listdir(run_dir) if fnmatch.fnmatch(f, 'evaluation*.json'))
  for file in sorted(files, key=lambda f: f != 'evaluation.json'):
    name = file.removeprefix('evaluation').removesuffix('.json').removeprefix('-') or 'eval'
    model = _evaluation(os.path.join(run_dir, file))
    if model is None:
      continue
    # What does not say what it read is of a loader of the user's own.
    read = model.get('split'), model.get('sources')
    if read == (None, None) or read == (found.get('split'), found['sources']):
      return f'{name}/bits_per_byte', model, others
    others[name] = f'{file} is of the split {read[0]!r} of {", ".join(read[1] or ["?"])}'
  return '', None, others


def _evaluation(path: str) -> dict[str, Any] | None:
  if not os.path.exists(path):
    return None
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); run the evaluation again') from error
  missing = {'step', 'loss'} - set(found)
  if missing:
    raise ValueError(f'{path} lacks {", ".join(sorted(missing))}; run the evaluation again')
  return found


def _replace(path: str, content: str) -> None:
  temporary = f'{path}.tmp'
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(content)
  os.replace(temporary, path)


def report(*, workdir: str, store_dir: str, source: sources_lib.Sources,
           train_split: str = 'train', split: str = 'validation',
           train_limit: int = 16 << 20) -> None:
  """Reports on a run and prints the comparison.

  Args:
    workdir: run directory.
    store_dir: folder that holds the token stores.
    source: what the model was trained on, as in `baselines.baselines`.
    train_split: split the baselines learn from.
    split: held-out split.
    train_limit: bytes of training text the compressors are primed with, at most.
  """
  workdir = os.path.expanduser(workdir)
  found = baselines.baselines(store_dir=store_dir, source=source, train_split=train_split,
                              split=split, train_limit=train_limit)
  title = f'{", ".join(found["sources"])}: {os.path.basename(os.path.normpath(workdir))}'
  result = write(workdir, found=found, title=title)
  if not found['bits_per_byte']:
    print(f'there are no bits per byte: {found["unknown"]}')
  elif 'bits_per_byte' in (result['evaluation'] or {}):
    rows = [[cell.strip('*').replace('`', '') for cell in row]
            for row in comparison(result['evaluation'], found=found)]
    print(tables.text_table(('held-out text', 'bits per byte', 'the model needs'), rows,
                            align='lrl'))
  print(f'wrote {os.path.join(workdir, "report.md")}, report.json and loss_curve.png')


def dry_run(*, workdir: str, store_dir: str, source: sources_lib.Sources,
            train_split: str = 'train', split: str = 'validation',
            train_limit: int = 16 << 20) -> None:
  """Checks that everything a report needs is there.

  Args:
    workdir: as in `report`.
    store_dir: as in `report`.
    source: as in `report`.
    train_split: as in `report`.
    split: as in `report`.
    train_limit: as in `report`.
  """
  workdir = os.path.expanduser(workdir)
  records = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  names = sources_lib.names_of(sources_lib.named(source, store_dir=store_dir))
  _, model, _ = _heldout(workdir, {'sources': names, 'split': split})
  print(f'{workdir}: {len(records):,} lines of metrics, '
        f'{"no evaluation" if model is None else "evaluated"}')
  baselines.dry_run(store_dir=store_dir, source=source, train_split=train_split, split=split,
                    train_limit=train_limit)


if __name__ == '__main__':
  sys.exit(config.run('t5x_like.report.report'))
