"""The report: baselines are what they claim to be, and a run's files become one page."""

import hashlib
import inspect
import json
import lzma
import math
import subprocess
import sys
import zlib
from importlib import import_module

import numpy as np
import pytest
from matplotlib import image

from t5x_like import baselines, ledger, metrics, report
from t5x_like.data import store as store_lib
from t5x_like.data import vocabularies

# Real text that every Python carries.
TRAIN = ('argparse', 'ast', 'difflib', 'tarfile', 'typing', 'inspect')
HELDOUT = ('csv', 'textwrap', 'shlex', 'fnmatch')


def sources(names):
  return [inspect.getsource(import_module(name)) for name in names]


def build(path, texts):
  vocabulary = vocabularies.load('bytes')
  features = {'targets': vocabulary.vocab_size}
  documents = [
    {'features': {'targets': np.array([*vocabulary.encode(text), vocabulary.eos_id])},
     'text_bytes': len(text.encode()), 'file': f'{i}.txt', 'position': 0,
     'hash': hashlib.md5(text.encode()).digest()} for i, text in enumerate(texts)]
  info = store_lib.write_shard(str(path), index=0, documents=documents, features=features)
  return store_lib.finish_store(str(path), shards=[info], features=features, task={'name': 't'},
                                vocabulary=vocabularies.describe(vocabulary, directory=str(path)))


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stores')
  build(folder / 'code' / 'train', sources(TRAIN))
  build(folder / 'code' / 'validation', sources(HELDOUT))
  return folder


def test_unigram_equals_the_sum_over_tokens():
  rng = np.random.default_rng(0)
  train, heldout = rng.integers(0, 50, 1000), rng.integers(0, 60, 300)
  bits = 0.0
  for token in heldout:
    bits -= math.log2((np.count_nonzero(train == token) + 1) / (1000 + 60))
  found = baselines.unigram_bits(baselines.count_tokens(train, vocab_size=60),
                                 heldout_counts=baselines.count_tokens(heldout, vocab_size=60))
  assert found == pytest.approx(bits, rel=1e-12)


def test_counting_in_chunks_counts_everything(monkeypatch):
  tokens = np.random.default_rng(0).integers(0, 9, 1000).astype(np.uint16)
  monkeypatch.setattr(baselines, '_CHUNK_TOKENS', 7)
  np.testing.assert_array_equal(baselines.count_tokens(tokens, vocab_size=9), np.bincount(tokens))


def test_gzip_is_deflate_9_primed_with_all_it_can_use():
  train = ''.join(sources(TRAIN)).encode()
  documents = [text.encode() for text in sources(HELDOUT)]
  # What `gzip -9` writes for text alone, less its 18 bytes of header and checksum.
  alone = sum(len(subprocess.run(['gzip', '-9'], input=d, capture_output=True, check=True).stdout)
              - 18 for d in documents)
  assert baselines.gzip_bits(documents, train=b'') == 8 * alone
  primed = baselines.gzip_bits(documents, train=train)
  assert primed < 8 * alone
  # More of the training text than this changes nothing; less costs bits.
  assert primed == baselines.gzip_bits(documents, train=train[-32768 + 262:])
  assert primed < baselines.gzip_bits(documents, train=train[-4096:])
  # The dictionary is one the decompressor could have.
  packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, train[-32506:])
  packed = packer.compress(documents[0]) + packer.flush()
  unpacker = zlib.decompressobj(-15, train[-32506:])
  assert unpacker.decompress(packed) == documents[0]


def test_xz_is_xz_9e():
  train = ''.join(sources(TRAIN)).encode()
  documents = [text.encode() for text in sources(HELDOUT)]
  size = {t: len(lzma.compress(t, preset=9 | lzma.PRESET_EXTREME))
          for t in (train, train + b''.join(documents))}
  found = baselines.compression_bits([documents], train=[train])
  assert found['xz'] == 8 * (size[train + b''.join(documents)] - size[train])
  assert found['gzip'] == baselines.gzip_bits(documents, train=train)


def test_spread_picks_evenly():
  assert list(baselines.spread(7, share=1.0)) == list(range(7))
  picked = list(baselines.spread(1000, share=0.1))
  assert len(picked) == 100 and set(np.diff(picked)) == {10}


def test_measures_stores_and_keeps_the_result(stores, monkeypatch):
  kept = stores / 'code'
  found = baselines.baselines(store_dir=str(stores), source='code')
  bits = found['bits_per_byte']
  heldout = ''.join(sources(HELDOUT)).encode()
  counts = [np.bincount(np.concatenate(
    [[*vocabularies.load('bytes').encode(t), vocabularies.load('bytes').eos_id]
     for t in sources(names)]), minlength=vocabularies.load('bytes').vocab_size)
    for names in (TRAIN, HELDOUT)]
  assert bits['unigram'] == pytest.approx(
    baselines.unigram_bits(counts[0], heldout_counts=counts[1]) / len(heldout))
  assert bits['xz'] == baselines.compression_bits(
    [[heldout]], train=[''.join(sources(TRAIN)).encode()])['xz'] / len(heldout)
  assert 1 < bits['xz'] < bits['gzip'] < bits['unigram'] < 8
  assert found['heldout_bytes'] == found['heldout_bytes_coded'] == len(heldout)

  def again(*args, **kwargs):
    raise AssertionError('measured twice')

  monkeypatch.setattr(baselines, 'measure', again)
  assert baselines.baselines(store_dir=str(stores), source='code') == found
  with pytest.raises(AssertionError, match='measured twice'):
    baselines.baselines(store_dir=str(stores), source='code', train_limit=1000)
  file, = kept.glob('baselines-*.json')
  file.write_text('{"bits_per')  # Torn by a kill.
  with pytest.raises(AssertionError, match='measured twice'):
    baselines.baselines(store_dir=str(stores), source='code')


def test_a_limit_is_kept_and_reported(stores):
  train, heldout = (store_lib.Store(str(stores / 'code' / s)) for s in ('train', 'validation'))
  found = {'sources': ['code'], **baselines.measure([train], heldout=[heldout],
                                                    train_limit=train.text_bytes // 2)}
  assert 0 < found['train_bytes_primed'] < 0.8 * train.text_bytes
  assert 'evenly spread documents' in report.text(
    model={'step': 1, 'bits_per_byte': 2.0, 'loss': 1.0, 'bytes': 5}, found=found, records=[],
    time=None)


def test_a_vocabulary_that_loses_text_is_reported(tmp_path):
  texts = ['a text that is not its tokens', 'another one']
  for split in ('train', 'validation'):
    folder = tmp_path / 'code' / split
    vocabulary = vocabularies.load('bytes')
    documents = [
      {'features': {'targets': np.array(vocabulary.encode(text)[3:])}, 'position': i,
       'hash': b'h' * 16, 'text_bytes': len(text), 'file': 'a.txt'} for i, text in enumerate(texts)]
    info = store_lib.write_shard(str(folder), index=0, documents=documents,
                                 features={'targets': vocabulary.vocab_size})
    store_lib.finish_store(str(folder), shards=[info], task={'name': 't'},
                           features={'targets': vocabulary.vocab_size},
                           vocabulary=vocabularies.describe(vocabulary, directory=str(folder)))
  found = baselines.baselines(store_dir=str(tmp_path), source='code')
  assert found['documents_altered'] == 4
  assert '4 documents decode to another length' in report.text(model=None, found=found, records=[],
                                                               time=None)


def trained(path, *, steps=400):
  rng = np.random.default_rng(0)
  writer = metrics.Jsonl(str(path / 'metrics.jsonl'))
  with ledger.Ledger(str(path / 'ledger.jsonl')) as book:
    book.resume(0)
    for step in range(1, steps + 1):
      loss = 2.2 + 3.5 / (1 + step / 30) + rng.normal() * 0.1
      with book.phase('productive'):
        writer.write(step, {'loss': math.nan if step == 200 else np.float32(loss),
                            'tokens_per_second': 6000.0 + step, 'mfu': 0.45, 'tokens': 2048.0})
      if step % 100 == 0:
        writer.write(step, {'eval/bits_per_byte': 1.5 + 1.5 / (1 + step / 100)})
      book.step(step)
  writer.close()


def test_a_run_becomes_a_report(stores, tmp_path, capsys):
  trained(tmp_path)
  (tmp_path / 'evaluation.json').write_text(json.dumps(
    {'step': 400, 'bits_per_byte': 1.8, 'loss': 2.3, 'tokens': 40000, 'bytes': 10}))
  report.report(workdir=str(tmp_path), store_dir=str(stores), source='code')
  shown = capsys.readouterr().out
  assert 'this model' in shown and 'gzip -9, primed' in shown and 'fewer bits' in shown
  text = (tmp_path / 'report.md').read_text()
  for part in ('**1.8000 bits per byte**', '| unigram token model |', '| `xz -9e`, primed |',
               'add-one smoothed', '![loss curve](loss_curve.png)', 'Where the time went',
               'Goodput', '| MFU (median) | 45.0 % |',
               '| real tokens per step (median) | 2,048 |', '| steps | 400 |',
               'evaluated on 10 bytes, not on all'):
    assert part in text, part
  result = json.loads((tmp_path / 'report.json').read_text())
  assert set(result['beats']) == {'unigram', 'gzip', 'xz'} and result['beats']['unigram']
  assert result['time']['attempts'] == 1
  picture = image.imread(str(tmp_path / 'loss_curve.png'))
  assert picture.shape[1] > 1200 and picture[..., :3].std() > 0.01
  assert not list(tmp_path.glob('*.tmp'))


def test_several_sources_are_measured_together(tmp_path, capsys):
  build(tmp_path / 'a' / 'train', sources(TRAIN[:3]))
  build(tmp_path / 'b' / 'train', sources(TRAIN[3:]))
  build(tmp_path / 'a' / 'validation', sources(HELDOUT[:1]))
  build(tmp_path / 'b' / 'validation', sources(HELDOUT[1:]))
  (tmp_path / 'mixtures').mkdir()
  (tmp_path / 'mixtures' / 'both.json').write_text('{"rates": {"a": 1, "b": 3}}')
  found = baselines.baselines(store_dir=str(tmp_path), source=('b', 'a'))
  assert found['sources'] == ['a', 'b'] and found['heldout_documents'] == len(HELDOUT)
  train, heldout = ([t.encode() for t in sources(names)] for names in (TRAIN, HELDOUT))
  assert found['heldout_bytes'] == sum(map(len, heldout))
  assert found['train_bytes_primed'] == sum(map(len, train))
  bits = found['bits_per_byte']
  # xz reads all as one stream; gzip is primed with the text of the document's own source.
  assert bits['xz'] * found['heldout_bytes'] == pytest.approx(8 * (
    baselines.xz_bytes(b''.join(train + heldout)) - baselines.xz_bytes(b''.join(train))))
  assert bits['gzip'] * found['heldout_bytes'] == pytest.approx(
    baselines.gzip_bits(heldout[:1], train=b''.join(train[:3]))
    + baselines.gzip_bits(heldout[1:], train=b''.join(train[3:])))
  trained(tmp_path, steps=2)
  assert 'measuring' in capsys.readouterr().err
  for source in ('both', {'a': 1.0, 'b': 3.0}):
    report.report(workdir=str(tmp_path), store_dir=str(tmp_path), source=source)
    assert 'measuring' not in capsys.readouterr().err
  assert 'The sources a, b are taken together' in (tmp_path / 'report.md').read_text()


def pairs(folder, *, split, said: bool):
  vocabulary = vocabularies.load('bytes')
  texts = [(f'Question {i}? ' * 9, f'Answer {i}.') for i in range(20)]
  documents = [
    {'features': {'inputs': np.array(vocabulary.encode(q)),
                  'targets': np.array([*vocabulary.encode(a), vocabulary.eos_id])},
     'text_bytes': len(q) + len(a), 'file': 'a', 'position': i, 'hash': bytes(16),
     **({'feature_bytes': {'inputs': len(q), 'targets': len(a)}} if said else {})}
    for i, (q, a) in enumerate(texts)]
  path, features = str(folder / 'qa' / split), {'inputs': 259, 'targets': 259}
  info = store_lib.write_shard(path, index=0, documents=documents, features=features)
  store_lib.finish_store(path, shards=[info], features=features, task={'name': 'qa'},
                         vocabulary=vocabularies.describe(vocabulary, directory=path))
  return [a for _, a in texts]


def test_of_inputs_and_targets_only_the_bytes_of_targets_count(tmp_path):
  answers = [pairs(tmp_path, split=s, said=True) for s in ('train', 'validation')][1]
  found = baselines.baselines(store_dir=str(tmp_path), source='qa')
  assert found['heldout_bytes'] == found['heldout_bytes_coded'] == len(''.join(answers))
  assert found['documents_altered'] == 0 and found['with_inputs']
  size = found['heldout_bytes']
  counts = baselines.count_tokens(np.concatenate(
    [[*vocabularies.load('bytes').encode(a), 1] for a in answers]), vocab_size=259)
  assert found['bits_per_byte']['unigram'] == pytest.approx(
    baselines.unigram_bits(counts, heldout_counts=counts) / size)
  assert 'has read the inputs' in report.text(model=None, found=found, records=[], time=None)


def test_a_store_that_does_not_say_the_bytes_of_its_targets_gets_no_bits_per_byte(tmp_path, capsys):
  for split in ('train', 'validation'):
    pairs(tmp_path, split=split, said=False)
  trained(tmp_path, steps=2)
  (tmp_path / 'evaluation.json').write_text(json.dumps(
    {'step': 2, 'bits_per_byte': 0.1, 'loss': 2.3, 'tokens': 40, 'bytes': 9999}))
  report.report(workdir=str(tmp_path), store_dir=str(tmp_path), source='qa')
  assert 'does not say how many bytes of its text are targets' in capsys.readouterr().out
  text = (tmp_path / 'report.md').read_text()
  assert '**loss 2.3000 nats per token**' in text and 'There are no bits per byte: ' in text
  assert '0.1000' not in text and 'gzip' not in text and '| coder' not in text
  assert 'beats' not in json.loads((tmp_path / 'report.json').read_text())


def test_the_report_takes_the_evaluation_of_the_held_out_text(stores, tmp_path):
  writer = metrics.Jsonl(str(tmp_path / 'metrics.jsonl'))
  for step in (1, 2):
    writer.write(step, {'loss': 3.0})
    writer.write(step, {'eval/bits_per_byte': 0.5})
    writer.write(step, {'val/bits_per_byte': 2.5})
  writer.close()
  on_train = {'step': 2, 'bits_per_byte': 0.5, 'loss': 0.1, 'split': 'train', 'sources': ['code']}
  (tmp_path / 'evaluation.json').write_text(json.dumps(on_train))
  report.report(workdir=str(tmp_path), store_dir=str(stores), source='code')
  text = (tmp_path / 'report.md').read_text()
  assert "evaluation.json is of the split 'train' of code. Run" in text and '0.5000' not in text
  held_out = {**on_train, 'bits_per_byte': 2.5, 'split': 'validation'}
  (tmp_path / 'evaluation-other.json').write_text(json.dumps({**held_out, 'sources': ['b']}))
  (tmp_path / 'evaluation-val.json').write_text(json.dumps(held_out))
  report.report(workdir=str(tmp_path), store_dir=str(stores), source='code')
  assert '**2.5000 bits per byte**' in (tmp_path / 'report.md').read_text()
  assert report.write(str(tmp_path), found=baselines.baselines(
    store_dir=str(stores), source='code'))['evaluation'] == held_out


GIN = """
from __gin__ import dynamic_registration
from t5x_like import report
report.report.workdir = %MODEL_DIR
report.report.store_dir = %STORE_DIR
report.report.source = 'code'
MODEL_DIR = %gin.REQUIRED
STORE_DIR = %gin.REQUIRED
"""


def test_the_entry_point_takes_gin(stores, tmp_path):
  trained(tmp_path, steps=40)
  (tmp_path / 'report.gin').write_text(GIN)
  command = [sys.executable, '-m', 't5x_like.report', f'--gin_file={tmp_path}/report.gin',
             f'--gin.MODEL_DIR="{tmp_path}"', f'--gin.STORE_DIR="{stores}"']
  done = subprocess.run([*command, '--dry_run'], capture_output=True, text=True)
  assert done.returncode == 0 and '40 lines of metrics, no evaluation' in done.stdout, done.stderr
  assert not (tmp_path / 'report.md').exists()
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0 and 'wrote' in done.stdout, done.stderr
  assert (tmp_path / 'report.md').exists()


def test_a_run_without_evaluation_says_so(stores, tmp_path):
  writer = metrics.Jsonl(str(tmp_path / 'metrics.jsonl'))
  for step in (1, 2):
    writer.write(step, {'loss': 3.0})
  writer.close()
  report.report(workdir=str(tmp_path), store_dir=str(stores), source='code')
  assert 'not evaluated' in (tmp_path / 'report.md').read_text()
  assert (tmp_path / 'loss_curve.png').exists()
  report.dry_run(workdir=str(tmp_path), store_dir=str(stores), source='code')


def test_errors_name_what_is_missing(stores, tmp_path):
  found = baselines.baselines(store_dir=str(stores), source='code')
  with pytest.raises(ValueError, match='there are no metrics at'):
    report.write(str(tmp_path), found=found)
  trained(tmp_path, steps=2)
  (tmp_path / 'evaluation.json').write_text('{"step": 2}')
  with pytest.raises(ValueError, match='evaluation.json lacks loss'):
    report.write(str(tmp_path), found=found)
  (tmp_path / 'evaluation.json').write_text('{"step": 2')
  with pytest.raises(ValueError, match='evaluation.json is damaged'):
    report.write(str(tmp_path), found=found)
  with pytest.raises(ValueError, match="unknown source: 'cod' in .*did you mean 'code'"):
    report.report(workdir=str(tmp_path), store_dir=str(stores), source='cod')
