"""What a step reads and when a document is read, asked as a user asks it."""

import hashlib
import subprocess
import sys

import pytest

from t5x_like import inspect
from t5x_like.data import loader as loader_lib
from t5x_like.data import store, vocabularies

TEXTS = ['The owl hooted.', 'A fox ran by.', 'Rain fell all night long.', 'Snow.']


@pytest.fixture
def root(tmp_path):
  vocabulary = vocabularies.load('bytes')
  path = str(tmp_path / 'tales' / 'train')
  documents = [{'features': {'targets': [*vocabulary.encode(text), vocabulary.eos_id]},
                'text_bytes': len(text), 'file': f'{i // 2}.txt', 'position': i % 2,
                'hash': hashlib.md5(text.encode()).digest()} for i, text in enumerate(TEXTS)]
  features = {'targets': vocabulary.vocab_size}
  shard = store.write_shard(path, index=0, documents=documents, features=features)
  store.finish_store(path, shards=[shard], features=features, task={'name': 'tales'},
                     vocabulary=vocabularies.describe(vocabulary))
  return tmp_path


def make(root):
  return loader_lib.Loader(sources='tales', store_dir=str(root), batch_size=2, length=20, seed=0)


def test_step_lists_documents_sources_and_text(root, capsys):
  built = make(root)
  found = inspect.inspect(loader=built, step=3)
  printed = capsys.readouterr().out
  assert printed.startswith(f'step 3: 2 rows of 20 tokens, {len(found)} pieces of documents')
  for piece in found:
    assert (f'tales:{piece["document"]} from token {piece["start"]}, epoch {piece["epoch"]}'
            in printed)
    assert f'{piece["document"] // 2}.txt document {piece["document"] % 2}' in printed
    text = TEXTS[piece['document']][piece['start']:piece['start'] + piece['length']]
    assert repr(text)[1:-1] in printed


def test_document_lists_the_steps_that_read_it(root, capsys):
  built = make(root)
  found = inspect.inspect(loader=built, doc='tales:2', epochs=3)
  printed = capsys.readouterr().out
  assert repr(TEXTS[2])[1:-1] in printed and len({f['epoch'] for f in found}) == 3
  for where in found:
    assert f'step {where["step"]} row {where["row"]}: tales:2 epoch {where["epoch"]}' in printed
    assert any(p['document'] == 2 and p['row'] == where['row']
               for p in built.contents(where['step']))


def test_exactly_one_question(root):
  for kwargs in ({}, {'step': 0, 'doc': 'tales:0'}):
    with pytest.raises(ValueError, match='give either --step, .* or --doc'):
      inspect.inspect(loader=make(root), **kwargs)


def test_from_the_command_line(root):
  gin = root / 'run.gin'
  gin.write_text(f'''
from __gin__ import dynamic_registration
from t5x_like import inspect
from t5x_like.data import loader
loader.Loader:
  sources = 'tales'
  store_dir = {str(root)!r}
  batch_size = 2
  length = 20
  seed = 0
inspect.inspect.loader = @loader.Loader()
''')
  command = [sys.executable, '-m', 't5x_like.inspect', f'--gin_file={gin}']
  shown = subprocess.run([*command, '--doc', 'tales:3'], capture_output=True, text=True)
  assert shown.returncode == 0, shown.stderr
  assert "'Snow." in shown.stdout and 'step ' in shown.stdout
  refused = subprocess.run([*command, '--doc', 'tales:9'], capture_output=True, text=True)
  assert refused.returncode == 2
  assert "'tales:9' does not exist: 'tales' holds documents 0 to 3" in refused.stderr
