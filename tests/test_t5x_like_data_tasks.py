"""seqio Tasks: the same tokens with and without TensorFlow, and any user's Task into a store."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import seqio
import tensorflow as tf
import tokenizers

from t5x_like.data import (
    pieces,
    prepare,
    seqio_vocabularies,
    tasks,
    textfiles,
    texttasks,
    vocabularies,
    workers,
)

# TensorFlow's AutoGraph on Python 3.13, which would give up on a function that warns.
pytestmark = pytest.mark.filterwarnings(
  'ignore:.*got an unexpected keyword argument:DeprecationWarning')

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = ['def f(x):\n\treturn x  # \u2581 and \u2581\u2581\r\n', 'Plain prose, 12345.', ' a  b ',
         '\u65e5\u672c\u8a9e \U0001f600\n\n', 'word ' * 50, '\u2581', 'x']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('in')
  for i, text in enumerate(TEXTS):
    (path / f'{i}.txt').write_bytes(text.encode())
  (path / 'a').mkdir()
  lines = ''.join(json.dumps({'text': f'record {i}'}) + '\n' for i in range(20))
  (path / 'a' / 'lines.jsonl').write_text(lines)
  pyarrow.parquet.write_table(pyarrow.table({'text': [f'row {i}' for i in range(20)]}),
                              path / 'a' / 'rows.parquet')
  return path


@pytest.fixture(scope='module')
def sentencepiece(tmp_path_factory):
  return pieces.train_sentencepiece([' '.join(TEXTS[:3]) * 20], vocab_size=300,
                                    path=str(tmp_path_factory.mktemp('v') / 'v.model'))


@pytest.fixture(scope='module')
def all_vocabularies(sentencepiece, tmp_path_factory):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=['<pad>', '</s>'], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  path = str(tmp_path_factory.mktemp('v') / 'tokenizer.json')
  tokenizer.save(path)
  return [sentencepiece, vocabularies.ByteVocabulary(), vocabularies.load(path),
          vocabularies.SentencePieceVocabulary(sentencepiece.path, extra_ids=4)]


def test_vocabularies_give_the_same_ids_in_tensorflow(all_vocabularies):
  for ours in all_vocabularies:
    wrapped = seqio_vocabularies.SeqioVocabulary(ours)
    assert wrapped.vocab_size == ours.vocab_size
    for text in [*TEXTS, '']:
      ids = ours.encode(text)
      assert wrapped.encode(text) == ids
      assert wrapped.encode_tf(tf.constant(text)).numpy().tolist() == ids
      assert wrapped.decode(ids) == text
      if ids:
        assert wrapped.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == text


@pytest.mark.parametrize('name', ['bytelevel_bpe_llama3', 'sp_bpe_llama/tokenizer.model',
                                  'sp_bpe_llama', 'sp_unigram'])
def test_published_tokenizers_give_the_same_ids_in_seqio(name):
  golden = pathlib.Path(__file__).parent / 'golden/hf/tokenizers'
  wrapped = seqio_vocabularies.seqio_of(vocabularies.load(str(golden / name)))
  ids = 'sp_ids' if name.endswith('.model') else 'ids'
  for pair in json.loads((golden / name.split('/')[0] / 'pairs.json').read_text()):
    assert list(wrapped.encode(pair['text'])) == pair[ids]
    assert wrapped.encode_tf(tf.constant(pair['text'])).numpy().tolist() == pair[ids]


def test_ids_are_those_of_seqio(sentencepiece):
  text = 'return <extra_id_1> x'
  for theirs in (seqio.ByteVocabulary(extra_ids=3), seqio.ByteVocabulary(),
                 seqio.SentencePieceVocabulary(sentencepiece.path),
                 seqio.SentencePieceVocabulary(sentencepiece.path, extra_ids=5)):
    ours = seqio_vocabularies.ours_of(theirs)
    assert not isinstance(ours, vocabularies.IdVocabulary)
    assert ours.vocab_size == theirs.vocab_size and ours.eos_id == theirs.eos_id
    assert ours.encode(text) == list(theirs.encode(text))
  other = seqio_vocabularies.ours_of(seqio.PassThroughVocabulary(size=50, eos_id=1))
  assert (other.kind, other.vocab_size, other.decode([4, 5, 1])) == ('ids', 50, '4 5')


def of_seqio(task, split):
  dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
  return [e['targets'].tolist() for e in dataset.as_numpy_iterator()]


def documents(store, feature='targets'):
  return [store.document_tokens(i, feature).tolist() for i in range(store.num_documents)]


def test_folder_gives_the_same_tokens_with_and_without_tensorflow(folder, all_vocabularies,
                                                                 tmp_path):
  for i, vocabulary in enumerate(all_vocabularies):
    task = tasks.text_task(f'same{i}', source=textfiles.Text(str(folder)), vocabulary=vocabulary,
                           validation_fraction=0.3)
    fast = tasks.registered(f'same{i}')
    assert isinstance(fast, texttasks.TextTask)
    for split in task.splits:
      built = prepare.build(fast, split=split, store_dir=str(tmp_path), pool=workers.Pool(1)).store
      assert documents(built) == of_seqio(task, split)
      assert built.num_documents > 3


def test_the_moved_document_is_the_same_with_and_without_tensorflow(folder, tmp_path):
  task = tasks.text_task('moved', source=textfiles.Text(str(folder)), vocabulary='bytes',
                         validation_fraction=1e-9)
  fast = tasks.registered('moved')
  assert isinstance(fast, texttasks.TextTask)
  for split, count in (('train', 46), ('validation', 1)):
    built = prepare.build(fast, split=split, store_dir=str(tmp_path), pool=workers.Pool(1)).store
    assert documents(built) == of_seqio(task, split) and built.num_documents == count


def test_through_seqio_the_store_is_the_same(folder, tmp_path):
  task = tasks.text_task('both_ways', source=textfiles.Text(str(folder)), vocabulary='bytes')
  fast = tasks.registered('both_ways')
  slow = tasks.SeqioTask('both_ways')
  a, b = (prepare.build(t, split='train', store_dir=str(tmp_path / n), pool=workers.Pool(1)).store
          for n, t in [('fast', fast), ('slow', slow)])
  assert documents(a) == documents(b) == of_seqio(task, 'train')
  np.testing.assert_array_equal(a.hashes, b.hashes)
  np.testing.assert_array_equal(a.byte_lengths, b.byte_lengths)
  files = [[s.lineage(i)['file'] for i in range(s.num_documents)] for s in (a, b)]
  assert files[0] == files[1] and 'a/rows.parquet' in files[0]


def test_registering_twice(folder):
  first = tasks.text_task('twice', source=textfiles.Text(str(folder)), vocabulary='bytes')
  again = tasks.text_task('twice', source=textfiles.Text(str(folder)), vocabulary='bytes')
  assert first is again
  with pytest.raises(ValueError, match="another task is registered as 'twice'"):
    tasks.text_task('twice', source=textfiles.Text(str(folder)), vocabulary='bytes', eos=())
  with pytest.raises(ValueError, match="called 'twise'; did you mean 'twice'"):
    tasks.registered('twise')


OUT_OF_TREE = '''
import functools
import os
import seqio

def shout(dataset, suffix):
  return dataset.map(lambda line: {'inputs': line, 'targets': line + suffix})

for name in ('lines_a', 'lines_b'):
  seqio.TaskRegistry.add(
    name,
    source=seqio.TextLineDataSource({'train': os.path.join(os.path.dirname(__file__), name + '*')}),
    preprocessors=[functools.partial(shout, suffix='!'), seqio.preprocessors.tokenize,
                   seqio.preprocessors.append_eos],
    output_features={
      'inputs': seqio.Feature(seqio.ByteVocabulary(), add_eos=False),
      'targets': seqio.Feature(seqio.ByteVocabulary())})
seqio.MixtureRegistry.add('lines', [('lines_a', 1), ('lines_b', lambda task: 3.0)])
'''

GIN = '''
from __gin__ import dynamic_registration
include 'data/seqio.gin'
TASK = 'lines'
MODULES = ('out_of_tree',)
SPLITS = ('train',)
'''


def test_mixture_of_a_module_outside_the_tree_from_the_command_line(tmp_path):
  (tmp_path / 'out_of_tree.py').write_text(OUT_OF_TREE)
  (tmp_path / 'lines_a.txt').write_text(''.join(f'a{i}\n' for i in range(21)))
  for shard in range(3):
    (tmp_path / f'lines_b{shard}.txt').write_text(f'b{shard}\n')
  (tmp_path / 'mine.gin').write_text(GIN)
  done = subprocess.run(
    [sys.executable, '-m', 't5x_like.prepare', '--gin_file=mine.gin', '--gin.STORE_DIR="stores"',
     '--gin.PROCESSES=2', f'--gin_search_paths={ROOT / "gin"}'], cwd=tmp_path, capture_output=True,
    text=True, env={**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{tmp_path}'})
  assert done.returncode == 0, done.stderr
  written = json.loads((tmp_path / 'stores' / 'mixtures' / 'lines.json').read_text())
  assert written == {'rates': {'lines_a': 1.0, 'lines_b': 3.0}}
  one = prepare.store_lib.Store(str(tmp_path / 'stores' / 'lines_a' / 'train'))
  byte = vocabularies.ByteVocabulary()
  assert sorted(byte.decode(d) for d in documents(one)) == sorted(f'a{i}!' for i in range(21))
  assert all(d[-1] == 1 for d in documents(one)) and documents(one, 'inputs')[0][-1] != 1
  many = prepare.store_lib.Store(str(tmp_path / 'stores' / 'lines_b' / 'train'))
  assert [many.lineage(i)['file'] for i in range(3)] == [f'lines_b{i}.txt' for i in range(3)]
  assert many.manifest['inputs'][0]['bytes'] == 3


def test_editing_a_preprocessor_is_another_definition():
  def one(dataset):
    return dataset.take(1)

  def two(dataset, count=1):
    return dataset.take(2 * count)

  assert tasks.described(one) != tasks.described(two)
  assert tasks.described(functools.partial(two, count=1)) != tasks.described(
    functools.partial(two, count=2))
  assert json.dumps(tasks.described(seqio.preprocessors.tokenize))


def test_task_that_needs_a_length_is_sent_to_the_live_loader(tmp_path):
  def cut(dataset, sequence_length):
    return dataset.map(lambda e: {'targets': e['targets'][:sequence_length['targets']]})

  def source(split, shuffle_files):
    del split, shuffle_files
    records: Any = {'targets': ['abc', 'de']}
    return tf.data.Dataset.from_tensor_slices(records)

  function: Any = source
  data: Any = seqio.FunctionDataSource(function, splits=['train'])
  seqio.TaskRegistry.add(
    'needs_length', source=data,
    preprocessors=[seqio.preprocessors.tokenize, cut],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())})
  task = tasks.registered('needs_length')
  assert isinstance(task, tasks.SeqioTask)
  with pytest.raises(ValueError, match="(?s)task 'needs_length', split 'train'.*live.LiveLoader"):
    prepare.build(task, split='train', store_dir=str(tmp_path), pool=workers.Pool(1))


def test_tfds_task_reads_its_keys(monkeypatch):
  task = tasks.tfds_task('from_tfds', dataset='none:1.0.0', vocabulary='bytes',
                         keys={'targets': 'content'}, splits={'train': 'train'})
  columns: Any = {'content': ['one', 'two'], 'other': [1, 2]}
  records = tf.data.Dataset.from_tensor_slices(columns)
  monkeypatch.setattr(task.source, 'get_dataset', lambda **_: records)
  monkeypatch.setattr(task.source, 'list_shards', lambda split: [split])
  byte = vocabularies.ByteVocabulary()
  dataset = task.get_dataset(None, 'train', shuffle=False, try_in_mem_cache=False)
  assert [byte.decode(e['targets']) for e in dataset.as_numpy_iterator()] == ['one', 'two']
