"""Shows what a step reads, or when a document is read: `python -m t5x_like.inspect --step K`.

Also `--doc ID`, where ID is source:number, a content hash, or a source file's name. Both are
arithmetic on the stores and the gin of a run, so they answer for runs that ended long ago.
"""

import sys
from typing import Any

from t5x_like import config, provenance
from t5x_like.data import loader as loader_lib

_SNIPPET = 60


def inspect(*, loader: loader_lib.Loader, step: int | None = None, doc: str | None = None,
            epochs: int = 1, workdir: str | None = None) -> list[dict[str, Any]]:
  """Prints the documents of a step, or the steps of a document.

  Args:
    loader: of the run.
    step: to list the documents of.
    doc: to list the steps of: 'source:number', a content hash (32 hex digits), or a file.
    epochs: how many epochs of the document's source to look through.
    workdir: the run's directory, whose record the stores must agree with; None asks nothing.

  Returns:
    What was printed, one entry per line; see `Loader.contents` and `Loader.locate`.

  Raises:
    ValueError: neither or both of step and doc, or there is no such document, or the stores are
      not those of the run.
  """
  if (step is None) == (doc is None):
    raise ValueError('give either --step, to see what a step reads, or --doc, to see which steps '
                     'read a document')
  if workdir is not None:
    provenance.check(workdir, loader=loader)
  if doc is not None:
    return _print_steps(loader, doc, epochs=epochs)
  assert step is not None
  return _print_contents(loader, step)


def _print_contents(loader: loader_lib.Loader, step: int) -> list[dict[str, Any]]:
  vocabulary = loader.vocabulary()
  found = loader.contents(step)
  targets = loader.batch(step)['targets']
  print(f'step {step}: {loader.batch_size} rows of {loader.length} tokens, '
        f'{len(found)} pieces of documents')
  for piece in found:
    end = piece['column'] + piece['length']
    tokens = targets[piece['row'], piece['column']:min(end, piece['column'] + _SNIPPET)]
    lineage = piece['lineage']
    print(f'row {piece["row"]} columns {piece["column"]}-{end - 1}: '
          f'{piece["source"]}:{piece["document"]} from token {piece["start"]}, '
          f'epoch {piece["epoch"]}, {lineage["file"]} document {lineage["position"]}, '
          f'hash {lineage["hash"]}')
    print(f'  {_snippet(vocabulary.decode(tokens.tolist()))}')
  return found


def _print_steps(loader: loader_lib.Loader, doc: str, *, epochs: int) -> list[dict[str, Any]]:
  vocabulary = loader.vocabulary()
  found = loader.locate(doc, epochs=epochs)
  for source, document in sorted({(f['source'], f['document']) for f in found}):
    tokens = loader.document_tokens(source, document)
    print(f'{source}:{document}: {len(tokens)} tokens: '
          f'{_snippet(vocabulary.decode(tokens[:_SNIPPET].tolist()))}')
  for where in found:
    print(f'step {where["step"]} row {where["row"]}: {where["source"]}:{where["document"]} '
          f'epoch {where["epoch"]}')
  if not found:
    print(f'{doc} is not read in the first {epochs} epochs of its source')
  return found


def _snippet(text: str) -> str:
  return repr(text[:_SNIPPET] + ('...' if len(text) > _SNIPPET else ''))


if __name__ == '__main__':
  sys.exit(config.run('t5x_like.inspect.inspect',
                      flags={'step': int, 'doc': str, 'epochs': int}))
