"""Tokenizers of published models: ids, text and special tokens exactly as their own libraries."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys
from typing import Any

import pytest
import tokenizers

from t5x_like import prepare
from t5x_like.data import loader, textfiles, texttasks, vocabularies
from t5x_like.data import pairs as data_pairs

GOLDEN = pathlib.Path(__file__).parent / 'golden/hf/tokenizers'
# The file, the fields of a pair, and the ids of bos, eos, pad and unk.
FILES = {
  'bytelevel_bpe_gpt2': ('tokenizer.json', 'ids', 'decoded', (0, 0, 0, None)),
  'bytelevel_bpe_gpt2/vocab.json': ('vocab.json', 'ids', 'decoded', (0, 0, 0, None)),
  'bytelevel_bpe_llama3': ('tokenizer.json', 'ids', 'decoded', (0, 1, 0, None)),
  'sp_bpe_llama': ('tokenizer.json', 'ids', 'decoded', (1, 2, 0, 0)),
  'sp_bpe_llama/tokenizer.model': ('tokenizer.model', 'sp_ids', 'sp_decoded', (1, 2, 0, 0)),
  'sp_unigram': ('spiece.model', 'ids', 'decoded', (None, 1, 0, 2)),
}


def pairs(name, file='pairs.json'):
  return json.loads((GOLDEN / name.split('/')[0] / file).read_text())


def open_one(name) -> Any:
  return vocabularies.load(str(GOLDEN / name))


def special_of(vocabulary):
  return vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id


@pytest.mark.parametrize('name', FILES)
def test_every_pair_is_exact(name):
  file, ids, decoded, special = FILES[name]
  vocabulary = open_one(name)
  assert pathlib.Path(vocabulary.path).name == file
  assert special_of(vocabulary) == special
  found = pairs(name)
  assert len(found) == 200
  for pair in found:
    assert vocabulary.encode(pair['text']) == pair[ids]
    if isinstance(vocabulary, vocabularies.TokenizerJsonVocabulary):
      assert vocabulary.decode_with_special(pair[ids]) == pair[decoded]
      if '<unk>' not in pair['text']:
        assert vocabulary.decode(pair[ids]) == pair[decoded]
    else:
      assert vocabulary.decode(pair[ids]) == pair[decoded]


@pytest.mark.parametrize('name', [n for n in FILES if 'gpt2' not in n])
def test_every_pair_is_exact_with_special_tokens(name):
  _, ids, decoded, _ = FILES[name]
  vocabulary = open_one(name)
  for pair in pairs(name):
    with_special = vocabulary.encode_with_special(pair['text'])
    if ids == 'sp_ids':
      assert with_special == [1, *pair['sp_ids']]
      assert vocabulary.decode(with_special) == pair['sp_decoded']
    else:
      assert with_special == pair['ids_with_special']
      assert vocabulary.decode(with_special) == pair.get('decoded_skip_special', pair[decoded])


@pytest.mark.parametrize('name', ['bytelevel_bpe_gpt2', 'bytelevel_bpe_llama3',
                                  'bytelevel_bpe_gpt2/vocab.json'])
def test_special_tokens_in_a_text_are_one_id(name):
  for pair in pairs(name, 'special_pairs.json'):
    vocabulary = open_one(name)
    assert vocabulary.encode(pair['text']) == pair['ids']
    assert vocabulary.decode_with_special(pair['ids']) == pair['text']


@pytest.mark.parametrize('name', FILES)
def test_half_a_character_and_ids_of_nothing_are_no_crash(name):
  vocabulary = open_one(name)
  with pytest.raises(ValueError, match=r"half a character, '\\ud83d' at 3, after 'abc'"):
    vocabulary.encode('abc\ud83d')
  assert vocabulary.decode([-1, 10**6, 2**40]) == ''


@pytest.mark.parametrize('name', FILES)
def test_a_store_and_a_process_bring_back_the_same_vocabulary(name, tmp_path):
  vocabulary, ids = open_one(name), FILES[name][1]
  described = vocabularies.describe(vocabulary, directory=str(tmp_path))
  back = vocabularies.from_manifest(json.loads(json.dumps(described)), directory=str(tmp_path))
  for other in (back, pickle.loads(pickle.dumps(back)), pickle.loads(pickle.dumps(vocabulary))):
    assert other.fingerprint() == vocabulary.fingerprint()
    assert special_of(other) == special_of(vocabulary)
    assert other.vocab_size == vocabulary.vocab_size
    assert all(other.encode(p['text']) == p[ids] for p in pairs(name)[:60:5])


def folder_of(tmp_path, name, *, keep='', **files):
  folder = tmp_path / 'model'
  folder.mkdir()
  for file in (GOLDEN / name).iterdir():
    if file.suffix in ('.model', '.json', '.txt') and file.name.startswith(keep):
      shutil.copy(file, folder)
  for stem, content in files.items():
    (folder / f'{stem}.json').write_text(json.dumps(content))
  return str(folder)


def test_special_tokens_are_those_that_the_configuration_names(tmp_path):
  said = {'bos_token': None, 'pad_token': {'content': '!', 'special': True}, 'unk_token': '?'}
  folder = folder_of(tmp_path, 'bytelevel_bpe_gpt2', tokenizer_config=said,
                     special_tokens_map={'unk_token': '#', 'eos_token': '$'})
  vocabulary = vocabularies.load(folder)
  ids = {token: vocabulary.encode(token)[0] for token in '!?$'}
  assert special_of(vocabulary) == (None, ids['$'], ids['!'], ids['?'])
  assert vocabularies.load(folder, eos='<|endoftext|>', bos='!').eos_id == 0
  assert vocabularies.load(folder, bos='!').bos_id == ids['!']
  # In a store the file stands alone, and the tokens stay.
  described = vocabularies.describe(vocabulary, directory=str(tmp_path))
  back = vocabularies.from_manifest(described, directory=str(tmp_path))
  assert special_of(pickle.loads(pickle.dumps(back))) == special_of(vocabulary)


def test_a_token_added_to_a_sentencepiece_model_lies_behind_its_pieces(tmp_path):
  folder = folder_of(tmp_path, 'sp_bpe_llama', keep='tokenizer.model', tokenizer_config={
    'pad_token': '[PAD]', 'added_tokens_decoder': {'1000': {'content': '[PAD]'}}})
  vocabulary = vocabularies.load(folder)
  assert special_of(vocabulary) == (1, 2, 1000, 0) and vocabulary.vocab_size == 1001
  ids = vocabulary.encode('a sea')
  assert vocabulary.decode([*ids, 1000, 2]) == 'a sea'
  plain = vocabularies.load(str(GOLDEN / 'sp_bpe_llama/tokenizer.model'))
  assert vocabulary.fingerprint() != plain.fingerprint()
  described = vocabularies.describe(vocabulary, directory=str(tmp_path))
  back = vocabularies.from_manifest(described, directory=str(tmp_path))
  assert (back.vocab_size, special_of(back)) == (1001, special_of(vocabulary))


def test_sentinels_of_a_published_model_are_counted(tmp_path):
  folder = folder_of(tmp_path, 'sp_unigram', keep='spiece', tokenizer_config={'extra_ids': 100})
  assert vocabularies.load(folder).vocab_size == 1100
  assert vocabularies.load(folder).encode('<extra_id_0>')[-1] == 1099
  assert vocabularies.load(folder, extra_ids=0).vocab_size == 1000


def test_an_unknown_piece_is_not_taken_for_padding(tmp_path):
  vocabulary = vocabularies.load(str(GOLDEN / 'sp_bpe_llama/tokenizer.model'))
  assert '\u2047' in vocabulary.decode([0])
  described = vocabularies.describe(vocabulary, directory=str(tmp_path))
  back = vocabularies.from_manifest(described, directory=str(tmp_path))
  assert back.decode([0]) == vocabulary.decode([0])


def test_what_cannot_be_used_is_named(tmp_path):
  folder = folder_of(tmp_path, 'bytelevel_bpe_llama3',
                     tokenizer_config={'eos_token': '<|end_of_txt|>'})
  with pytest.raises(ValueError, match=r"json has no token '<.end_of_txt.>'; did you mean "
                                       r"'<.end_of_text.>'\? It is to be eos: name .* with eos="):
    vocabularies.load(folder)
  assert vocabularies.load(folder, eos='<|end_of_text|>').eos_id == 1
  (tmp_path / 'model/tokenizer_config.json').write_text('{')
  with pytest.raises(ValueError, match='tokenizer_config.json cannot be read'):
    vocabularies.load(folder)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty/vocab.json').write_text('{}')
  with pytest.raises(ValueError, match='empty has no tokenizer: looked for .*; it has vocab.json'):
    vocabularies.load(str(tmp_path / 'empty'))
  (tmp_path / 'empty/merges.txt').write_text('a')
  with pytest.raises(ValueError, match='are not a byte-level vocabulary'):
    vocabularies.load(str(tmp_path / 'empty'))
  with pytest.raises(ValueError, match="vocabulary 'bytes' has tokens of its own, so eos would"):
    vocabularies.load('bytes', eos='x')


def tokenizer_of(folder, tokens, **config):
  """A published tokenizer that knows these words."""
  folder.mkdir()
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return str(folder)


def test_masks_and_sentinels_of_published_tokenizers_serve_objectives(tmp_path):
  (tmp_path / 'a.txt').write_text('a b a b')

  def known(name, tokens, **config):
    task = texttasks.TextTask(name, textfiles.Text(str(tmp_path / 'a.txt')), validation_fraction=0)
    stores = prepare.prepare(task=task, store_dir=str(tmp_path / 'stores'), processes=1,
                             vocabulary=tokenizer_of(tmp_path / name, tokens, **config))
    return data_pairs.vocabulary_of(stores)

  bert = known('bert', ['[UNK]', '[MASK]', '[SEP]', 'a', 'b'])
  assert (bert.mask_id, bert.sentinels, bert.size) == (1, 0, 5)
  t5 = known('t5', ['<unk>', '</s>', 'a', 'b', '<extra_id_1>', '<extra_id_0>'])
  assert (t5.mask_id, t5.sentinels, t5.size) == (None, 2, 6)
  named = known('named', ['<unk>', '</s>', 'hidden', 'a', 'b'], mask_token='hidden')
  assert (named.mask_id, named.sentinels) == (2, 0)
  lacking = known('lacking', ['<unk>', '</s>', 'a', 'b'], mask_token='<no such token>')
  assert (lacking.mask_id, lacking.sentinels) == (None, 0)


_RUN = """
import sys
from t5x_like import config

folder, tokenizer = sys.argv[1:]
data = [f'--gin.STORE_DIR="{folder}/stores"']
assert config.run('t5x_like.prepare.prepare', [
  '--gin_file=gin/data/text.gin', f'--gin.TEXT_DIR="{folder}/notes"', '--gin.PROCESSES=1',
  '--gin.VALIDATION_FRACTION=0.3', f'--gin.VOCABULARY="{tokenizer}"', *data]) == 0
tiny = {'LENGTH': 16, 'BATCH_SIZE': 2, 'TRAIN_STEPS': 2, 'WARMUP_STEPS': 1, 'HOOKS': '[]',
        'mesh.make_mesh.devices': 1}
tiny |= {f'config.DecoderConfig.{k}': v for k, v in
         {'embed': 16, 'layers': 1, 'heads': 2, 'mlp': 32}.items()}
assert config.run('t5x_like.train.train', [
  '--gin_file=gin/runs/pretrain.gin', '--gin_file=gin/models/decoder_tiny.gin',
  f'--gin.MODEL_DIR="{folder}/run"', '--gin.SOURCES="text"', *data,
  *(f'--gin.{k}={v}' for k, v in tiny.items())]) == 0
assert config.run('t5x_like.generate.generate', [
  f'--gin_file={folder}/run/config.gin', '--prompt', 'A ship', '--new_tokens', '3'],
  flags={'prompt': str, 'new_tokens': int}) == 0
print('loaded:', [m for m in ('tensorflow', 'seqio', 'transformers') if m in sys.modules])
"""


def test_a_store_a_run_and_a_sample_with_a_published_tokenizer(tmp_path):
  (tmp_path / 'notes').mkdir()
  for i in range(30):
    (tmp_path / f'notes/{i}.txt').write_text(f'Ship {i} sails ' + 'over the sea, ' * (i % 5 + 1))
  folder = folder_of(tmp_path, 'bytelevel_bpe_llama3', tokenizer_config={
    'bos_token': '<|begin_of_text|>', 'eos_token': {'content': '<|end_of_text|>'}})
  done = subprocess.run([sys.executable, '-c', _RUN, str(tmp_path), folder], cwd=GOLDEN.parents[3],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'loaded: []' in done.stdout and 'A ship' in done.stdout
  vocabulary = vocabularies.load(folder)
  data = loader.Loader(sources='text', store_dir=str(tmp_path / 'stores'), batch_size=2, length=16,
                       seed=0)
  assert (data.bos_id, data.eos_id, data.vocab_size) == (0, 1, 1024)
  tokens = data.document_tokens('text', 0).tolist()
  assert vocabulary.decode(tokens).startswith('Ship ') and tokens[-1] == 1


def test_a_changed_begin_token_makes_another_store(tmp_path):
  (tmp_path / 'a.txt').write_text('A ship.')
  folder = folder_of(tmp_path, 'bytelevel_bpe_gpt2')

  def prepared(**settings):
    task = texttasks.TextTask('notes', source=textfiles.Text(str(tmp_path / 'a.txt')),
                              validation_fraction=0)
    return prepare.prepare(task=task, store_dir=str(tmp_path / 'stores'), processes=1,
                           splits=['train'], vocabulary=vocabularies.load(folder, **settings))

  assert prepared()['notes/train'].bos_id == 0
  with pytest.raises(ValueError, match=r'bos_id was 0, now \d+'):
    prepared(bos='!')
