"""seqio Tasks and Mixtures: from folders of text, from TFDS, and whatever a user has registered.

A task made here from text files is both a seqio Task and a `TextTask`, which gives the same tokens
without TensorFlow. Any other task is read through seqio itself.
"""

import difflib
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

# Before TensorFlow is imported: it reports every accelerator it cannot use, and needs none.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data import seqio_vocabularies, textfiles, texttasks, vocabularies

# The accelerator is JAX's: TensorFlow would take all of its memory.
tf.config.set_visible_devices([], 'GPU')

SEED = 42
_PREPROCESSORS = (seqio.preprocessors.tokenize, seqio.preprocessors.append_eos)


class TextSource(seqio.DataSource):
  """The documents of a `TextTask` as strings, one feature per key, a file at a time.

  Args:
    task: with its vocabulary.
  """

  def __init__(self, task: texttasks.TextTask):
    super().__init__(splits=task.splits)
    self.task = task

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def __repr__(self) -> str:
    return f'TextSource({self.task.name}: {self.task.source.paths})'

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the names of the files: any document of theirs may be in any split."""
    del split
    return [f.name for f in self.task.files()]

  def get_dataset(self, split: str = 'train', shuffle: bool = True, seed: int | None = None,
                  shard_info: seqio.ShardInfo | None = None, **unused: Any) -> tf.data.Dataset:
    """Returns the documents of a split, in canonical order unless shuffled by file."""
    del unused
    files, names = self.task.files(), list(self.task.source.keys)
    moved = self.task.division().moved

    def read(index: np.ndarray) -> list[np.ndarray]:
      part = textfiles.Part(files[index])
      texts = [d.texts for _, d in self.task.read([part], split=split, moved=moved, skipped=[])]
      return [np.array([t[n].encode() for t in texts], object) for n in names]

    def load(index: tf.Tensor) -> tf.data.Dataset:
      columns = tf.numpy_function(read, [index], [tf.string] * len(names), stateful=False)
      for column in columns:
        column.set_shape([None])
      features: Any = dict(zip(names, columns, strict=True))
      return tf.data.Dataset.from_tensor_slices(features)

    dataset = tf.data.Dataset.range(len(files))
    if shard_info:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    if shuffle:
      dataset = dataset.shuffle(len(files), seed=seed)
    return dataset.flat_map(load)


def text_task(name: str, *, source: textfiles.Text, vocabulary: vocabularies.Vocabulary | str,
              validation_fraction: float = 0.05, eos: Sequence[str] = ('targets',)) -> seqio.Task:
  """Registers a seqio Task over text files; the same call twice gives the same Task.

  Args:
    name: of the task.
    source: where the text is.
    vocabulary: of every feature; or 'bytes', or the path of a .model or tokenizer.json.
    validation_fraction: expected share of documents held out as split 'validation', in [0, 1).
    eos: features that end in EOS.

  Raises:
    ValueError: another task has this name.
  """
  if isinstance(vocabulary, str):
    vocabulary = vocabularies.load(vocabulary)
  task = texttasks.TextTask(name, source, vocabulary=vocabulary, eos=eos,
                            validation_fraction=validation_fraction)
  features = _features(source.keys, vocabulary=vocabulary, eos=eos)
  return _register(name, source=TextSource(task), features=features, before=())


def tfds_task(name: str, *, dataset: str, vocabulary: vocabularies.Vocabulary | str,
              keys: Mapping[str, str] | None = None, splits: Mapping[str, str] | None = None,
              data_dir: str | None = None, eos: Sequence[str] = ('targets',)) -> seqio.Task:
  """Registers a seqio Task over a TensorFlow Datasets dataset of text.

  Args:
    name: of the task.
    dataset: TFDS name, such as 'wikipedia/20230601.en:1.0.0'.
    vocabulary: of every feature; or 'bytes', or the path of a .model or tokenizer.json.
    keys: the dataset's feature with the text of each of ours; default {'targets': 'text'}.
    splits: TFDS split or slice for each of our splits, such as {'train': 'train[1%:]'}.
    data_dir: folder of prepared TFDS datasets.
    eos: features that end in EOS.

  Raises:
    ValueError: another task has this name.
  """
  if isinstance(vocabulary, str):
    vocabulary = vocabularies.load(vocabulary)
  keys = {'targets': 'text'} if keys is None else keys
  source = seqio.TfdsDataSource(tfds_name=dataset, tfds_data_dir=data_dir, splits=splits)
  rekey = functools.partial(_rekey, keys=dict(keys))
  return _register(name, source=source, before=(rekey,),
                   features=_features(keys, vocabulary=vocabulary, eos=eos))


def mixture(name: str, *, rates: Mapping[str, float]) -> seqio.Mixture:
  """Registers a seqio Mixture of registered Tasks and Mixtures.

  Args:
    name: of the mixture.
    rates: by name, > 0; only their ratios matter.
  """
  for member in rates:
    _provider(member)
  return seqio.MixtureRegistry.add(name, list(rates.items()))


def registered(name: str, *, modules: Sequence[str] = ()
               ) -> texttasks.Preparable | texttasks.Mixture:
  """Returns a seqio Task or Mixture for `prepare`.

  Args:
    name: as registered; the module that registers it must have been imported, or be in `modules`.
    modules: to import first, here and in worker processes.

  Raises:
    ValueError: nothing is registered under this name; names the nearest.
  """
  for module in modules:
    importlib.import_module(module)
  provider = _provider(name)
  if isinstance(provider, seqio.Mixture):
    members = [t for t in provider.tasks if provider.get_rate(t) > 0]
    tasks = [registered(t.name, modules=modules) for t in members]
    return texttasks.Mixture(name, tasks=tasks,  # pyright: ignore[reportArgumentType]
                             rates=[provider.get_rate(t) for t in members])
  if isinstance(provider.source, TextSource) and tuple(provider.preprocessors) == _PREPROCESSORS:
    return provider.source.task
  return SeqioTask(name, modules=tuple(modules) or _seqio_modules())


class SeqioTask:
  """A registered seqio Task, read through seqio; a worker process finds it by name.

  Args:
    name: as registered.
    modules: imported where it is not registered yet.
  """

  def __init__(self, name: str, *, modules: Sequence[str] = ()):
    self.name, self._modules = name, tuple(modules)
    self.task = seedable(_provider(name))

  def __reduce__(self) -> tuple[Callable[..., 'SeqioTask'], tuple[str, tuple[str, ...]]]:
    return _in_worker, (self.name, self._modules)

  @property
  def portable(self) -> bool:
    """Whether another process can find it: whether some module can be imported for it."""
    return bool(self._modules)

  @property
  def feature_vocabularies(self) -> dict[str, vocabularies.Vocabulary]:
    """Vocabulary of each feature."""
    return {name: seqio_vocabularies.ours_of(feature.vocabulary)
            for name, feature in self.task.output_features.items()}

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of its splits."""
    return tuple(self.task.splits)

  def definition(self) -> dict[str, Any]:
    """Returns what decides the tokens as far as it can be seen: source, code of preprocessors."""
    return {'kind': 'seqio', 'source': described(self.task.source),
            'preprocessors': [described(p) for p in self.task.preprocessors],
            'eos': sorted(n for n, f in self.task.output_features.items() if f.add_eos)}

  def files(self) -> list[textfiles.File]:
    """Returns those of its shards that are files here."""
    paths = sorted({s for split in self.splits for s in self.task.source.list_shards(split)
                    if os.path.isfile(s)})
    root = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths or ['.'])
    return [textfiles.File(p, os.path.relpath(p, root), os.path.getsize(p)) for p in paths]

  def units(self, split: str) -> list[texttasks.Unit]:
    """Returns one unit per shard of the source, or eight strides of a source that is one shard."""
    shards: list[str] = list(self.task.source.list_shards(split))
    count = min(len(shards), 1024) if len(shards) > 1 else 8
    names: dict[str, str] = {f.path: f.name for f in self.files()}
    units = []
    for index in range(count):
      members = shards[index::count] if len(shards) > 1 else shards
      size = sum(os.path.getsize(s) for s in members if os.path.isfile(s)) or 1
      units.append(texttasks.Unit(tuple(names.get(s, s) for s in members),
                                  size // (1 if len(shards) > 1 else count), [index, count],
                                  (index, count)))
    return units

  def documents(self, unit: texttasks.Unit, *, split: str, skipped: list[textfiles.Skipped]
                ) -> Iterator[dict[str, Any]]:
    """Yields the documents of one shard as `shards.write_shard` takes them."""
    del skipped
    index, count = unit.parts
    try:
      dataset = self.task.get_dataset(
        sequence_length=None, split=split, shuffle=False, seed=SEED, num_epochs=1,
        shard_info=seqio.ShardInfo(index, count), trim_output_features=False,
        try_in_mem_cache=False)
      for position, example in enumerate(dataset.as_numpy_iterator()):
        yield self._document(example, position=position, file=', '.join(unit.names[:3]))
    except (tf.errors.OpError, TypeError, KeyError) as error:
      raise ValueError(
        f'task {self.name!r}, split {split!r}, shard {", ".join(unit.names[:3])}: {error}. If its '
        f'preprocessing needs sequence_length, use t5x_like.data.live.LiveLoader') from error

  def _document(self, example: Mapping[str, Any], *, position: int, file: str) -> dict[str, Any]:
    tokens, texts = {}, {}
    for name, feature in self.task.output_features.items():
      tokens[name] = np.asarray(example[name])
      text = example.get(f'{name}_pretokenized')
      if not isinstance(text, bytes):
        decoded = feature.vocabulary.decode(tokens[name].tolist())
        text = decoded.encode() if isinstance(decoded, str) else tokens[name].tobytes()
      texts[name] = text.decode(errors='replace')
    document = textfiles.document(texts, position)
    return {'features': tokens, 'text_bytes': document.bytes, 'file': file, 'position': position,
            'feature_bytes': document.feature_bytes, 'hash': document.hash}


def seedable(task: Any) -> Any:
  """Returns the Task or Mixture such that it accepts a seed, which seqio refuses for some sources.

  Args:
    task: its preprocessing is only deterministic when it is given a seed.
  """
  if isinstance(task, seqio.Mixture):
    members = [(seedable(t), task.get_rate(t)) for t in task.tasks]
    return seqio.Mixture(task.name, members, sample_fn=task._sample_fn)
  read = getattr(task.source, '_dataset_fn', None)
  if read is None or 'seed' in inspect.signature(read).parameters:
    return task

  def seeded(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del seed
    return read(split=split, shuffle_files=shuffle_files)

  functools.update_wrapper(seeded, read)
  del seeded.__wrapped__
  return task.replace(source=seqio.FunctionDataSource(seeded, splits=task.source.splits))


def described(thing: Any) -> Any:
  """Returns JSON-able data that changes when a preprocessor's or source's code or arguments do."""
  if isinstance(thing, functools.partial):
    return [described(thing.func), described(list(thing.args)), described(thing.keywords)]
  if isinstance(thing, Mapping):
    return {str(k): described(v) for k, v in sorted(thing.items(), key=lambda i: str(i[0]))}
  if isinstance(thing, list | tuple):
    return [described(v) for v in thing]
  if thing is None or isinstance(thing, str | int | float | bool):
    return thing
  if isinstance(thing, TextSource):
    return thing.task.definition()
  if inspect.isroutine(thing):
    closure = getattr(inspect.unwrap(thing), '__closure__', None) or ()
    return [f'{thing.__module__}.{thing.__qualname__}', _source_hash(thing),
            [described(c.cell_contents) for c in closure if c.cell_contents is not thing]]
  inner = getattr(thing, '_dataset_fn', None)  # Of a FunctionDataSource.
  return [re.sub(r' at 0x[0-9a-f]+', '', str(thing)), described(inner)]


def _rekey(dataset: tf.data.Dataset, *, keys: Mapping[str, str]) -> tf.data.Dataset:
  return dataset.map(lambda example: {ours: example[theirs] for ours, theirs in keys.items()})


def _source_hash(function: Any) -> str:
  try:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
  except (OSError, TypeError):
    return ''


def _features(names: Mapping[str, str], *, vocabulary: vocabularies.Vocabulary, eos: Sequence[str]
              ) -> dict[str, Any]:
  wrapped = seqio_vocabularies.seqio_of(vocabulary)
  return {name: seqio.Feature(vocabulary=wrapped, add_eos=name in eos) for name in names}


def _register(name: str, *, source: seqio.DataSource, features: Mapping[str, Any],
              before: Sequence[Callable[..., Any]]) -> seqio.Task:
  task = seqio.Task(name, source=source, output_features=features,
                    preprocessors=[*before, *_PREPROCESSORS])
  if name in seqio.TaskRegistry.names():
    known = seqio.TaskRegistry.get(name)

    was, now = ([described(t.source), described(t.preprocessors), dict(t.output_features)]
                for t in (known, task))
    if was != now:
      raise ValueError(f'another task is registered as {name!r}: choose another name')
    return known
  return seqio.TaskRegistry.add_provider(name, task) or task


def _provider(name: str) -> Any:
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in known:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise ValueError(f'no seqio Task or Mixture is called {name!r}; {hint}registered: '
                     f'{", ".join(sorted(known)) or "none"}; import the module that registers it')
  return seqio.get_mixture_or_task(name)


def _seqio_modules() -> tuple[str, ...]:
  """Modules loaded here that use seqio and may have registered tasks."""
  ours = ('seqio', 't5x_like', 'tensorflow', 'tensorflow_datasets', '__main__', '__mp_main__')
  return tuple(sorted(
    name for name, module in list(sys.modules.items())
    if name.split('.')[0] not in ours and getattr(module, '__spec__', None) is not None
    and any(value is seqio for value in list(vars(module).values()))))


def _in_worker(name: str, modules: Sequence[str]) -> SeqioTask:
  for module in modules:
    importlib.import_module(module)
  try:
    return SeqioTask(name, modules=modules)
  except ValueError as error:
    _refuse(name, modules, error)


def _refuse(name: str, modules: Sequence[str], error: Exception) -> NoReturn:
  raise ValueError(f'{error}. A worker process imported {", ".join(modules)}; name the module that '
                   f'registers {name!r} with modules=, or set processes=1') from None
