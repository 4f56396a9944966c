"""Vocabularies: nothing of a text is lost, ids are seqio's, and a wrong file is named."""

import os
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import pieces, vocabularies

CODE = 'def add(a, b):\n    """Adds."""\n\treturn a + b  # 12345\r\n\n\nclass Über:\n  pass\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('vocabularies')


@pytest.fixture(scope='module', params=['bpe', 'unigram'])
def trained(request, folder):
  texts = [f'{CODE}variable_{i} = {i}\nSome prose about things, {i} of them.\n' for i in range(300)]
  return pieces.train_sentencepiece(texts, path=str(folder / f'{request.param}.model'),
                                    vocab_size=400, model=request.param)


@pytest.fixture(scope='module')
def tokenizer_json(folder):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator([CODE], tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=['<pad>', '<|endoftext|>'], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  path = str(folder / 'tokenizer.json')
  tokenizer.save(path)
  return vocabularies.load(path)


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text(alphabet=' \n\t\r\u2581\u3000<0x>a\0\ufeff\u2047\u2585'))
def test_decode_undoes_encode(trained, text):
  ids = trained.encode(text)
  assert trained.decode(ids) == text
  assert all(2 < i < trained.vocab_size for i in ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_bytes_and_json_undo_encode(tokenizer_json, text):
  for vocabulary in (vocabularies.ByteVocabulary(), tokenizer_json):
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_special_ids_are_those_of_t5(trained):
  assert (trained.pad_id, trained.eos_id, trained.unk_id, trained.bos_id) == (0, 1, 2, None)
  assert trained.decode([*trained.encode('a b'), 1, 5, 0]) == 'a b'
  assert len(trained.encode(CODE)) < len(CODE.encode()) * 0.7


def test_tokenizer_json_special_tokens(tokenizer_json):
  assert (tokenizer_json.pad_id, tokenizer_json.eos_id) == (0, 1)
  other = vocabularies.TokenizerJsonVocabulary(tokenizer_json.path, eos='a')
  assert other.eos_id == other.encode('a')[0]
  assert other.fingerprint() != tokenizer_json.fingerprint()
  with pytest.raises(ValueError, match=r"no token '<.endoftex.>'; did you mean '<.endoftext.>'"):
    vocabularies.TokenizerJsonVocabulary(tokenizer_json.path, eos='<|endoftex|>')


def test_training_is_deterministic(folder):
  first, second = (pieces.train_sentencepiece([CODE * 20], path=str(folder / name), vocab_size=320)
                   for name in ('a.model', 'b.model'))
  assert first.model == second.model and first.fingerprint() == second.fingerprint()


def test_manifest_brings_back_the_same_vocabulary(trained, tokenizer_json, tmp_path):
  for i, vocabulary in enumerate([trained, tokenizer_json, vocabularies.ByteVocabulary(extra_ids=5),
                                  vocabularies.SentencePieceVocabulary(trained.path, extra_ids=3)]):
    directory = tmp_path / str(i)
    directory.mkdir()
    described = vocabularies.describe(vocabulary, directory=str(directory))
    back = vocabularies.from_manifest(described, directory=str(directory))
    assert back.fingerprint() == vocabulary.fingerprint() == described['fingerprint']
    assert back.vocab_size == vocabulary.vocab_size
    assert back.encode(CODE) == vocabulary.encode(CODE)
    assert pickle.loads(pickle.dumps(back)).encode(CODE) == vocabulary.encode(CODE)


def test_another_file_in_the_store_is_refused(trained, tmp_path):
  described = vocabularies.describe(trained, directory=str(tmp_path))
  pieces.train_sentencepiece([CODE.upper() * 9], path=str(tmp_path / 'vocabulary.model'),
                             vocab_size=300)
  with pytest.raises(ValueError, match='is not the vocabulary this store was written with'):
    vocabularies.from_manifest(described, directory=str(tmp_path))


def test_sentinels_lie_at_the_end(trained):
  vocabulary = vocabularies.SentencePieceVocabulary(trained.path, extra_ids=2)
  assert vocabulary.vocab_size == trained.vocab_size + 2
  ids = [*trained.encode('a'), trained.vocab_size + 1, *trained.encode('b')]
  assert vocabulary.decode(ids) == 'a <extra_id_0>b'


def test_errors_name_what_is_wrong(folder):
  junk = str(folder / 'junk.model')
  with open(junk, 'wb') as file:
    file.write(b'no model')
  with pytest.raises(ValueError, match='junk.model is not a SentencePiece model'):
    vocabularies.load(junk)
  with pytest.raises(ValueError, match="vocabulary 'byte' is unknown.*did you mean 'bytes'"):
    vocabularies.load('byte')
  with pytest.raises(ValueError, match='cannot read vocabulary .*none.json: No such file'):
    vocabularies.load(str(folder / 'none.json'))
  with pytest.raises(ValueError, match='cannot train a vocabulary of 4000 pieces on .* smaller'):
    pieces.train_sentencepiece(['too little'], path=str(folder / 'x.model'), vocab_size=4000)
  with pytest.raises(ValueError, match='no text to train'):
    pieces.train_sentencepiece([], path=str(folder / 'x.model'))
  with pytest.raises(ValueError, match='vocab_size=100 leaves no room'):
    pieces.train_sentencepiece(['a'], path=str(folder / 'x.model'), vocab_size=100)
  assert not os.path.exists(folder / 'x.model')
