"""data.json of a run: which stores and which vocabulary its weights come from, and the check of it.

A store's folder can be prepared anew after a run has read it. What then looks at the run through
that folder would show other text through another tokenizer, so it is refused instead.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5x_like.data import store as store_lib

FILE = 'data.json'


def describe(loader: Any) -> dict[str, Any]:
  """Returns what a loader's batches come from.

  Args:
    loader: of training. One that says no more than its fingerprint is described by that.

  Returns:
    'fingerprint' of the batches; 'vocabulary', the fingerprint of the vocabulary or None; 'stores',
    by source and split the fingerprint of each store, splits that are not read included.
  """
  vocabulary = loader.vocabulary() if hasattr(loader, 'vocabulary') else None
  stores: Mapping[str, store_lib.Store] = getattr(loader, 'stores', {})
  return {'fingerprint': loader.fingerprint,
          'vocabulary': _fingerprint(vocabulary),
          'stores': {name: _splits(store) for name, store in stores.items()}}


def record(workdir: str, loader: Any) -> None:
  """Writes `describe(loader)` to `workdir/data.json`, whole or not at all."""
  path = epath.Path(workdir) / FILE
  partial = epath.Path(f'{path}.partial')
  partial.write_text(json.dumps(describe(loader), indent=1) + '\n')
  os.replace(partial, path) if '://' not in str(path) else partial.rename(path)


def check(run: epath.PathLike, *, loader: Any = None, vocabulary: Any = None) -> None:
  """Refuses data that a run was not trained with; says nothing of a run without data.json.

  Sources that the run has not read may be given: only their vocabulary must be that of the run.

  Args:
    run: the run's directory, or one checkpoint in it.
    loader: whose stores and vocabulary are to be those of the run.
    vocabulary: that is to be the run's.

  Raises:
    ValueError: the vocabulary, or a store of the same name, is another one.
  """
  folder = epath.Path(os.path.expanduser(run))
  path = (folder.parent if folder.name.isdigit() else folder) / FILE
  if not path.exists():
    return
  try:
    known = json.loads(path.read_text())
    stores, trained = known['stores'], known['vocabulary']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is damaged ({error}): remove it to do without its check') from None
  for name, store in getattr(loader, 'stores', {}).items():
    split = os.path.basename(store.path)
    _same(path, f'the store {store.path}', now=store.fingerprint,
          then=stores.get(name, {}).get(split))
  if vocabulary is None and hasattr(loader, 'vocabulary'):
    vocabulary = loader.vocabulary()
  _same(path, 'the vocabulary', now=_fingerprint(vocabulary), then=trained)


def _fingerprint(vocabulary: Any) -> str | None:
  return vocabulary.fingerprint() if hasattr(vocabulary, 'fingerprint') else None


def _same(path: epath.Path, what: str, *, now: str | None, then: str | None) -> None:
  if now is not None and then is not None and now != then:
    raise ValueError(
        f'{what} is not the one this run was trained with: its fingerprint is {now[:12]}, but '
        f'{path} says {then[:12]}. It was prepared anew since, or belongs to another run: set '
        f'STORE_DIR and SOURCES to the store of that fingerprint, prepare the text of that time '
        f'again under a task name of its own, or train again')


def _splits(store: store_lib.Store) -> dict[str, str]:
  task = os.path.dirname(store.path)
  found = {os.path.basename(store.path): store.fingerprint}
  for split in sorted(os.listdir(task)):
    if not split.startswith('.') and os.path.exists(os.path.join(task, split, store_lib.MANIFEST)):
      found[split] = store_lib.Store(os.path.join(task, split)).fingerprint
  return found
