"""Preparing stores: resumable, reused, never a mixture, and bad input is named by file and line."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from t5x_like import prepare
from t5x_like.data import pieces, shards, store, textfiles, texttasks, vocabularies, workers
from t5x_like.data import prepare as prepare_lib

ROOT = pathlib.Path(__file__).parents[1]
BYTES = vocabularies.ByteVocabulary()


def write_folder(folder, count=40):
  for i in range(count):
    path = folder / f'd{i % 3}' / f'{i:03d}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f'Document {i}.\r\n{"x" * (i % 7)}\n'.encode())
  return folder


def text_task(paths, *, name='t', vocabulary: vocabularies.Vocabulary | None = BYTES,
              validation_fraction=0.0, **source):
  return texttasks.TextTask(name, textfiles.Text(str(paths), **source), vocabulary=vocabulary,
                            validation_fraction=validation_fraction)


def build(paths, store_dir, *, split='train', processes=1,
          existing: prepare_lib.Existing = 'refuse', **task):
  with workers.Pool(processes) as pool:
    return prepare_lib.build(text_task(paths, **task), split=split, store_dir=str(store_dir),
                             pool=pool, existing=existing)


def texts(built):
  return [BYTES.decode(built.document_tokens(i)) for i in range(built.num_documents)]


def test_documents_come_back_whole_in_order_of_their_names(tmp_path):
  folder = write_folder(tmp_path / 'in')
  (folder / 'empty.txt').touch()
  (folder / 'other.log').write_text('not taken')
  built = build(folder, tmp_path / 'out')
  names = sorted(str(p.relative_to(folder)) for p in folder.rglob('*.txt') if p.stat().st_size)
  assert texts(built.store) == [(folder / n).read_bytes().decode() for n in names]
  assert [built.store.lineage(i)['file'] for i in range(len(names))] == names
  assert built.store.lineage(3)['bytes'] == (folder / names[3]).stat().st_size
  assert built.skipped == [textfiles.Skipped('empty.txt', 'empty')]
  recorded = {i['file']: i for i in built.store.manifest['inputs']}
  assert recorded[names[0]]['sha256'] == shards.sha256_of(str(folder / names[0]))
  built.store.verify()


def test_split_keeps_documents_whole_and_copies_together(tmp_path):
  folder = write_folder(tmp_path / 'in', 200)
  for i in range(100):
    (folder / f'copy{i}.txt').write_bytes((folder / f'd{i % 3}' / f'{i:03d}.txt').read_bytes())
  splits = [build(folder, tmp_path / 'out', split=split, validation_fraction=0.2).store
            for split in ('train', 'validation')]
  train, held_out = (set(texts(s)) for s in splits)
  assert not train & held_out
  assert sum(s.num_documents for s in splits) == 300
  assert 20 < len(held_out) < 60


def test_same_store_whoever_works_on_it(tmp_path):
  folder = write_folder(tmp_path / 'in')
  big = folder / 'big'
  big.mkdir()
  for i in range(6):
    (big / f'{i}.txt').write_text(f'{i}' * 400_000)
  one = build(folder, tmp_path / 'one').store
  two = build(folder, tmp_path / 'two', processes=2).store
  assert len(one.manifest['shards']) > 2
  assert one.fingerprint == two.fingerprint
  np.testing.assert_array_equal(one.tokens()[:], two.tokens()[:])


RUN = '''
import sys
from t5x_like import prepare
from t5x_like.data import textfiles, texttasks
if __name__ == '__main__':
  task = texttasks.TextTask('t', textfiles.Text(sys.argv[1]), validation_fraction=0.0)
  prepare.prepare(task=task, store_dir=sys.argv[2], vocabulary='bytes', splits=('train',),
                  processes=2)
'''


def test_killed_and_started_again_gives_the_same_store(tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  for i in range(24):
    (folder / f'{i:02d}.txt').write_text(f'{i} lines\n' * 90_000)
  script = tmp_path / 'run.py'
  script.write_text(RUN)
  command = [sys.executable, str(script), str(folder), str(tmp_path / 'out')]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  building = tmp_path / 'out' / 't' / '.train.building'
  with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
    while process.poll() is None and len(list(building.glob('shard-*[0-9].json'))) < 3:
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.stderr is not None
    process.stderr.read()  # Its end is that of the last worker.
  # A shard's description is written last, so a shard without one is not kept.
  whole = [p.name.removesuffix('.json') for p in building.glob('shard-*[0-9].json')]
  kept = {p: p.stat().st_mtime_ns for p in (building / f'{w}.targets.bin' for w in whole)}
  assert 3 <= len(kept) < 24 and not (tmp_path / 'out' / 't' / 'train').exists()
  with pytest.raises(ValueError, match='run prepare'):
    store.store_path(str(tmp_path / 'out'), source='t', split='train')
  again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  assert 'shards are already there' in again.stderr and 'train resumed in' in again.stderr
  resumed = store.Store(str(tmp_path / 'out' / 't' / 'train'))
  assert all((tmp_path / 'out/t/train' / p.name).stat().st_mtime_ns == t for p, t in kept.items())
  assert resumed.fingerprint == build(folder, tmp_path / 'whole').store.fingerprint
  resumed.verify()


def test_finished_store_is_reused_and_never_mixed(tmp_path):
  folder, out = write_folder(tmp_path / 'in'), tmp_path / 'out'
  first = build(folder, out)
  assert (first.how, build(folder, out).how) == ('built', 'reused')
  os.utime(folder / 'd0' / '000.txt')
  assert build(folder, out).how == 'reused'
  moved = folder.rename(tmp_path / 'moved')
  assert build(moved, out).how == 'reused'
  (moved / 'd0' / '000.txt').write_text('changed')
  (moved / 'new.txt').write_text('new')
  with pytest.raises(ValueError, match='1 input files added: new.txt; 1 input files changed: '
                                       "d0/000.txt.*existing='rebuild'"):
    build(moved, out)
  with pytest.raises(ValueError, match='validation_fraction was 0.0, now 0.5'):
    build(moved, out, validation_fraction=0.5)
  assert store.Store(first.store.path).fingerprint == first.store.fingerprint
  rebuilt = build(moved, out, existing='rebuild').store
  assert 'changed' in texts(rebuilt) and rebuilt.num_documents == 41
  assert sorted(p.name for p in (out / 't').iterdir()) == [
    '.inputs.json', '.train.lock', 'train']


def test_shards_of_another_definition_are_not_kept(tmp_path):
  folder, out = write_folder(tmp_path / 'in'), tmp_path / 'out'
  (folder / 'zz.txt').write_bytes(b'\xff')
  with pytest.raises(ValueError, match='not UTF-8'):
    build(folder, out)
  (folder / 'zz.txt').unlink()
  wider = vocabularies.ByteVocabulary(extra_ids=7)
  built = build(folder, out, vocabulary=wider)
  assert built.store.vocab_size == 266
  assert built.store.fingerprint == build(folder, tmp_path / 'b', vocabulary=wider
                                          ).store.fingerprint


def test_records_from_every_kind_of_file(tmp_path):
  records = [{'prompt': f'p{i}', 'answer': f'ä{i}\n'} for i in range(3)]
  lines = b''.join(json.dumps(r).encode() + b'\n' for r in records)
  (tmp_path / 'a.jsonl').write_bytes(lines)
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(lines))
  frames = zstandard.ZstdCompressor()
  (tmp_path / 'c.jsonl.zst').write_bytes(frames.compress(lines[:10]) + frames.compress(lines[10:]))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'd.parquet')
  source = textfiles.Text(str(tmp_path), extensions=('.jsonl', '.parquet'),
                          keys={'inputs': 'prompt', 'targets': 'answer'})
  task = texttasks.TextTask('pairs', source, vocabulary=BYTES, validation_fraction=0.0)
  built = prepare_lib.build(task, split='train', store_dir=str(tmp_path / 'o'),
                            pool=workers.Pool(1)).store
  assert texts(built) == [r['answer'] for r in records] * 4
  assert [built.lineage(i)['position'] for i in range(12)] == [0, 1, 2] * 4
  assert built.document_tokens(0, 'inputs').tolist() == BYTES.encode('p0')
  assert built.document_tokens(0)[-1] == 1
  for feature, key in (('inputs', 'prompt'), ('targets', 'answer')):
    lengths = built.feature_bytes(feature)
    assert lengths is not None and lengths.tolist() == [len(r[key].encode()) for r in records] * 4
  assert len({built.lineage(i)['hash'] for i in range(12)}) == 3


def test_one_large_file_is_read_in_parts(tmp_path):
  records = [{'text': f'{i} ' + 'x' * (i % 900)} for i in range(6000)]
  (tmp_path / 'big.jsonl').write_text('\n'.join(json.dumps(r) for r in records))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'big.parquet',
                              row_group_size=500, compression='none', use_dictionary=False)
  for name in ('big.jsonl', 'big.parquet'):
    built = build(tmp_path / name, tmp_path / name[4:]).store
    assert len(built.manifest['shards']) > 2
    assert texts(built) == [r['text'] for r in records]
    assert [built.lineage(i)['position'] for i in range(6000)] == list(range(6000))
  lines = (tmp_path / 'big.jsonl').read_bytes().split(b'\n')
  lines[5000] = b'{'
  (tmp_path / 'big.jsonl').write_bytes(b'\n'.join(lines))
  with pytest.raises(ValueError, match='big.jsonl:5001: malformed JSON'):
    build(tmp_path / 'big.jsonl', tmp_path / 'bad')


def test_excluded_folders_are_left_out(tmp_path):
  for name in ('a.txt', 'test/b.txt', 'lib/test/c.txt', 'lib/testing.txt', 'site/x/d.txt',
               '.git/e.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  source = textfiles.Text(str(tmp_path), exclude=('*test/*', 'site/*'))
  assert [f.name for f in source.files()] == ['a.txt', 'lib/testing.txt']


def test_separator_cuts_a_file_into_documents(tmp_path):
  (tmp_path / 'all.txt').write_text('one\n<|end|>two<|end|>\n')
  built = build(tmp_path / 'all.txt', tmp_path / 'out', separator='<|end|>').store
  assert texts(built) == ['one\n', 'two', '\n']


def put(path, data):
  path.write_bytes(data)
  return path


BAD = {
  'utf8.txt': (b'ab\xffc', r'utf8\.txt: byte 2 is not UTF-8 \(0xff\)'),
  'line.jsonl': (b'{"text": "a"}\n{"text": "b"\n', r'line\.jsonl:2: malformed JSON'),
  'bytes.jsonl': (b'{"text": "a"}\n{"text": "\xff"}\n', r'bytes\.jsonl:2: byte 24 is not UTF-8'),
  'key.jsonl': (b'{"text": "a"}\n{"texts": "b"}\n',
                r"key\.jsonl:2: there is no key 'text'; did you mean 'texts'"),
  'list.jsonl': (b'["a"]\n', r'list\.jsonl:1: a JSON object is needed'),
  'half.jsonl': (b'{"text": "a"}\n{"text": "b\\ud800"}\n',
                 r"half\.jsonl:2: 'text' holds '\\ud800', half of a surrogate pair.*errors='skip'"),
  'kind.jsonl': (b'{"text": 7}\n', r"kind\.jsonl:1: 'text' must be text, got int"),
  'short.jsonl.gz': (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], r'short\.jsonl\.gz is truncated'),
  'not.jsonl.gz': (b'{"text": "a"}\n', r'not\.jsonl\.gz is not a gzip file'),
  'short.jsonl.zst': (zstandard.compress(b'{"text": "a"}\n' * 99)[:-3],
                      r'short\.jsonl\.zst is damaged: its zstandard data ends too early'),
  'not.jsonl.zst': (b'{"text": "a"}\n', r'not\.jsonl\.zst is damaged'),
  'bad.parquet': (b'PAR1 no', r'bad\.parquet is not a readable parquet file'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named_and_leaves_no_store(tmp_path, name):
  data, message = BAD[name]
  (tmp_path / 'in').mkdir()
  put(tmp_path / 'in' / name, data)
  put(tmp_path / 'in' / 'good.txt', b'good')
  with pytest.raises(ValueError, match=message):
    build(tmp_path / 'in', tmp_path / 'out')
  assert not list((tmp_path / 'out').rglob('manifest.json'))
  assert not list((tmp_path / 'out').rglob('*.tmp'))


def test_folders_behind_links_are_read_once(tmp_path):
  notes, other = tmp_path / 'notes', tmp_path / 'other'
  for path in (notes / 'z' / 'own.txt', other / 'deep' / 'far.txt', notes / 'top.txt'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
  (notes / 'a').symlink_to(notes / 'z')  # There under its own name.
  (notes / 'link').symlink_to(other)
  (notes / 'twice').symlink_to(other / 'deep')
  (notes / 'z' / 'up').symlink_to(notes)  # A loop, and the way out of the folder.
  (notes / 'out').symlink_to(tmp_path)
  (other / 'deep' / 'back').symlink_to(notes)
  (notes / 'broken').symlink_to(tmp_path / 'nowhere')
  names = [f.name for f in textfiles.Text(str(notes)).files()]
  assert names == ['link/deep/far.txt', 'top.txt', 'z/own.txt']
  names = [f.name for f in textfiles.Text(str(notes), exclude=('link/*',)).files()]
  assert names == ['top.txt', 'twice/far.txt', 'z/own.txt']


def test_names_that_are_not_utf8_are_kept_escaped(tmp_path):
  folder = write_folder(tmp_path / 'in', 3)
  odd = os.fsencode(folder) + b'/caf\xe9.txt'
  with open(odd, 'wb') as file:
    file.write(b'menu')
  built = build(folder, tmp_path / 'out')
  index = texts(built.store).index('menu')
  assert built.store.lineage(index)['file'] == r'caf\xe9.txt'
  assert built.store.find(r'caf\xe9.txt').tolist() == [index]
  assert build(folder, tmp_path / 'out').how == 'reused'
  with open(odd, 'wb') as file:
    file.write(b'\xff')
  with pytest.raises(ValueError, match=r'caf.*\.txt: byte 0 is not UTF-8'):
    build(folder, tmp_path / 'b')
  skipped = build(folder, tmp_path / 'c', errors='skip').skipped
  assert [s.name for s in skipped] == [r'caf\xe9.txt']


def test_a_line_that_is_no_text_is_left_out_if_told(tmp_path):
  put(tmp_path / 'a.jsonl', b'{"text": "a"}\n{"text": "b\\ud800"}\n{"text": "\\ud83d\\ude00"}\n')
  built = build(tmp_path / 'a.jsonl', tmp_path / 'out', errors='skip')
  assert texts(built.store) == ['a', '\U0001f600']
  assert [s.name for s in built.skipped] == ['a.jsonl']
  assert "a.jsonl:2: 'text' holds '\\ud800', half of a surrogate" in built.skipped[0].reason


def test_a_jsonl_may_begin_with_a_byte_order_mark(tmp_path):
  put(tmp_path / 'a.jsonl', b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xef\xbb\xbfb"}\n')
  assert texts(build(tmp_path / 'a.jsonl', tmp_path / 'out').store) == ['a', '\ufeffb']
  put(tmp_path / 'b.jsonl', b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
  with pytest.raises(ValueError, match=r'b\.jsonl:2: malformed JSON'):
    build(tmp_path / 'b.jsonl', tmp_path / 'out2')


def test_error_in_a_worker_process_is_the_same(tmp_path):
  folder = write_folder(tmp_path / 'in')
  for i in range(3):
    (folder / f'big{i}.txt').write_text('x' * 1_100_000)
  put(folder / 'zz.txt', b'\xff')
  with pytest.raises(ValueError, match=r'zz\.txt: byte 0 is not UTF-8.*exclude it, or set errors'):
    build(folder, tmp_path / 'out', processes=2)
  built = build(folder, tmp_path / 'out', errors='skip')
  assert built.skipped[0].name == 'zz.txt' and built.store.num_documents == 43


def test_missing_input_is_named(tmp_path):
  folder = write_folder(tmp_path / 'docs', 3)
  for paths, message in [(tmp_path / 'dosc', 'no file or folder .*did you mean .*docs'),
                         (folder / '*.rst', r'no file matches .*\*\.rst')]:
    with pytest.raises(ValueError, match=message):
      build(paths, tmp_path / 'out')
  with pytest.raises(ValueError, match=r"no file in .* ends in \.md: it has 3 of '\.txt'"):
    build(folder, tmp_path / 'out', extensions=('.md',))
  with pytest.raises(ValueError, match='is excluded by'):
    build(folder, tmp_path / 'out', exclude=('*',))
  (tmp_path / 'void').mkdir()
  put(tmp_path / 'void' / 'a.txt', b'')
  with pytest.raises(ValueError, match=r'no document: 1 files were read, 1 left out \(a\.txt: '):
    build(tmp_path / 'void', tmp_path / 'out')
  with pytest.raises(ValueError, match="has no split 'validation'; it has: train"):
    build(folder, tmp_path / 'out', split='validation')


def test_one_command_trains_a_vocabulary_on_the_train_split(tmp_path, capsys):
  folder = write_folder(tmp_path / 'in', 60)
  task = text_task(folder, vocabulary=None, validation_fraction=0.3)
  with pytest.raises(ValueError, match="task 't' has no vocabulary: set prepare.vocabulary"):
    prepare.prepare(task=task, store_dir=str(tmp_path / 'out'), processes=1)
  settings: dict[str, Any] = dict(task=task, store_dir=str(tmp_path / 'out'), processes=1,
                  vocabulary=pieces.Training(vocab_size=300))
  stores = prepare.prepare(**settings)
  assert sorted(stores) == ['t/train', 't/validation']
  train = stores['t/train']
  vocabulary = vocabularies.from_manifest(train.manifest['vocabulary'], directory=train.path)
  decoded = {vocabulary.decode(train.document_tokens(i)) for i in range(train.num_documents)}
  assert decoded == set(task.sample(1 << 20))
  assert '/t/train built in' in capsys.readouterr().err
  prepare.prepare(**settings)
  assert '/t/train reused in' in capsys.readouterr().err
  with pytest.raises(ValueError, match='vocabulary=bytes would have no effect'):
    prepare.prepare(task=text_task(folder), store_dir=str(tmp_path / 'out'), vocabulary='bytes')
  prepare.dry_run(**settings)
  assert 'train: exists' in capsys.readouterr().out


def test_mixture_is_written_beside_the_stores(tmp_path):
  tasks = [text_task(write_folder(tmp_path / n, 5), name=n) for n in ('a', 'b')]
  stores = prepare.prepare(task=texttasks.Mixture('both', tasks, rates=(1, 3)), processes=1,
                           store_dir=str(tmp_path / 'out'), splits=('train',))
  assert sorted(stores) == ['a/train', 'b/train']
  written = json.loads((tmp_path / 'out' / 'mixtures' / 'both.json').read_text())
  assert written == {'rates': {'a': 1.0, 'b': 3.0}}
  with pytest.raises(ValueError, match="rate 0 for 'b': it must be positive"):
    texttasks.Mixture('both', tasks, rates=(1, 0))


def test_folders_need_no_tensorflow():
  code = ('import sys, t5x_like.prepare\n'
          'print([m for m in ("tensorflow", "seqio", "jax", "torch") if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                        check=True)
  assert done.stdout.strip() == '[]'
