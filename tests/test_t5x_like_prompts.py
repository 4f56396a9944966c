"""What stands around a prompt: as a run was trained, or as the files of an import say."""

import json
from typing import Any

import pytest
import toy

from models import config, encdec, encoder
from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import checkpoints, decode, generate, prompts, state
from t5x_like.data import vocabularies


class Tokenizer(vocabularies.ByteVocabulary):
  """Bytes, with tokens that its own library puts around a text."""

  def __init__(self, before=(), after=(), bos=None, eos: Any = 1):
    super().__init__()
    self.before, self.after, self.bos_id, self.eos_id = list(before), list(after), bos, eos

  def encode_with_special(self, text):
    return [*self.before, *self.encode(text), *self.after]


def of(config, vocabulary, generation=None, tokenizer=None):
  return prompts.of_files(config, generation or {}, tokenizer or {}, vocabulary=vocabulary)


def test_published_models_are_prompted_as_their_own_files_say():
  # Llama 3.1: its tokenizer begins with a token, and three tokens end a text.
  llama = of({'bos_token_id': 9, 'eos_token_id': 8}, Tokenizer([9], bos=9),
             generation={'eos_token_id': [8, 7, 6]})
  assert (llama.before, llama.begin, llama.stop) == ((9,), 9, (8, 7, 6))
  # GPT-NeoX and Falcon: nothing before a text, and one token for both ends.
  neox = of({'bos_token_id': 5, 'eos_token_id': 5}, Tokenizer(bos=5, eos=5))
  assert (neox.before, neox.begin, neox.stop) == ((), 5, (5,))
  # T5: its tokenizer ends what is read, and the decoder starts with padding.
  t5 = of({'decoder_start_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0}, Tokenizer(after=[1]))
  assert (t5.before, t5.after, t5.start, t5.stop) == ((), (1,), 0, (1,))
  # Files that say nothing: what the tokenizer knows.
  silent = of({}, Tokenizer(bos=4, eos=3))
  assert (silent.before, silent.begin, silent.stop) == ((), 4, (3,))
  assert of({}, Tokenizer(eos=None)).stop == ()
  assert of({'text_config': {'eos_token_id': 6}}, Tokenizer()).stop == (6,)


@pytest.mark.parametrize('adds, before', [(True, (9,)), (False, ())])
def test_what_tokenizer_config_says_of_the_begin_token_wins(adds, before):
  found = of({}, Tokenizer([9] if not adds else [], bos=9), tokenizer={'add_bos_token': adds})
  assert found.before == before


@pytest.fixture(scope='module')
def t5(tmp_path_factory):
  """An encoder-decoder that has learnt nothing: arguments of `generate`, and its module."""
  stack = config.DecoderConfig(vocab=260, embed=16, layers=1, heads=2, mlp=16, dtype='float32',
                               position='relative', layer_loop='unroll')
  definition = encdec.EncDecLM(config=encdec.EncDecConfig(encoder=stack, decoder=stack))
  described = toy.structure(definition)
  params = state.initial(definition, described, toy.optax.sgd(0.1), seed=3)['params']
  folder = tmp_path_factory.mktemp('t5')
  with checkpoints.Checkpointer(folder, every=1, mode='sync') as made:
    made.save(1, {'params': params}, extra={}, force=True)
  given = dict(model=definition, mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(),
               checkpoint=str(folder), sampling=decode.Sampling(temperature=0))
  return given, described.module(params), folder


def greedy(module, read, *, start, count):
  """Token by token without a cache."""
  written = [start]
  for _ in range(count):
    logits = module(toy.np.array([read], 'int32'), toy.np.array([written], 'int32'))
    written.append(int(logits[0, -1].argmax()))
  return written[1:]


def test_an_encoder_reads_the_prompt_and_the_decoder_starts_as_trained_or_imported(t5, monkeypatch):
  given, module, folder = t5
  drawn = []
  monkeypatch.setattr(vocabularies.ByteVocabulary, 'decode', lambda self, ids: drawn.append(ids))
  vocabulary = vocabularies.ByteVocabulary()
  generate.generate(**given, vocabulary=vocabulary, prompt='ab', new_tokens=3)
  # As in training: the row ends in the end token, and the decoder starts with padding.
  assert drawn.pop() == greedy(module, [100, 101, 1], start=0, count=3)
  kept = folder / 'hf'
  kept.mkdir()
  (kept / 'config.json').write_text(json.dumps({'decoder_start_token_id': 7}))
  try:
    generate.generate(**given, vocabulary=Tokenizer(after=[5]), prompt='ab', new_tokens=3)
    expected = greedy(module, [100, 101, 5], start=7, count=3)
    assert drawn.pop() == expected
    # The second token ends the text, where the import says so.
    (kept / 'generation_config.json').write_text(json.dumps({
      'eos_token_id': [259, expected[1]], 'decoder_start_token_id': 7}))
    generate.generate(**given, vocabulary=Tokenizer(after=[5]), prompt='ab', new_tokens=3)
    assert drawn.pop() == expected[:expected.index(expected[1])]
    (kept / 'generation_config.json').write_text('[')
    with pytest.raises(ValueError, match='generation_config.json is not JSON'):
      generate.generate(**given, vocabulary=vocabulary)
  finally:
    for file in kept.iterdir():
      file.unlink()
    kept.rmdir()


def test_what_cannot_write_or_read_is_refused_by_name(t5):
  given, _, _ = t5
  with pytest.raises(ValueError, match=r"reading='prefix' is for decoders alone; EncDecLM reads"):
    generate.generate(**given, vocabulary=vocabularies.ByteVocabulary(), reading='prefix')
  with pytest.raises(ValueError, match='is no import and keeps no tokenizer: set VOCABULARY'):
    generate.generate(**given)
  stack = config.DecoderConfig(vocab=260, embed=16, layers=1, heads=2, mlp=16, dtype='float32')
  bert = encoder.EncoderLM(config=encoder.EncoderConfig(stack=stack))
  with pytest.raises(ValueError, match='EncoderLM has no cache .* so it writes no text'):
    generate.generate(**{**given, 'model': bert}, vocabulary=vocabularies.ByteVocabulary())


def test_a_prompt_read_in_both_directions_is_continued_so():
  definition = toy.model(layers=1)
  described = toy.structure(definition)
  params = state.initial(definition, described, toy.optax.sgd(0.1), seed=3)['params']
  module, found = described.module(params), {}
  prompt = toy.np.array([[3, 9, 4, 30]], 'int32')
  for reading in ('causal', 'prefix'):
    run = decode.Generator(described, definition, sampling=decode.Sampling(temperature=0),
                           reading=reading)
    found[reading] = run(params, [prompt[0].tolist(), [5]], new_tokens=1)[0]
    ones = toy.np.ones_like(prompt)
    logits = module(prompt, **({'prefix': ones} if reading == 'prefix' else {}))
    assert found[reading] == [int(logits[0, -1].argmax())]
  with pytest.raises(ValueError, match="reading='both' is unknown; allowed: 'causal', 'prefix'"):
    decode.Generator(described, definition, sampling=decode.Sampling(),
                     reading='both')  # pyright: ignore
