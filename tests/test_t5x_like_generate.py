"""Generation from a run: the begin id of training, and what is refused before any work."""

import pytest
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import checkpoints, decode, generate, limits, state
from t5x_like.data import vocabularies


class Letters(vocabularies.ByteVocabulary):
  """Bytes with a begin id of their own."""

  bos_id = 2


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Arguments of `generate` for a model with 16 learned positions that has not learnt anything."""
  folder = tmp_path_factory.mktemp('generate')
  definition = toy.model(vocab=260, layers=1, position='learned', max_length=16)
  described = toy.structure(definition)
  params = state.initial(definition, described, toy.optax.sgd(0.1), seed=3)['params']
  with checkpoints.Checkpointer(folder, every=1, mode='sync') as made:
    made.save(1, {'params': params}, extra={}, force=True)
  return dict(model=definition, mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(),
              checkpoint=str(folder), sampling=decode.Sampling(temperature=0))


def prompts_given(monkeypatch):
  found = []
  given = decode.Generator.__call__
  monkeypatch.setattr(decode.Generator, '__call__', lambda self, params, prompts, **k: (
      found.extend(prompts), given(self, params, prompts, **k))[1])
  return found


@pytest.mark.parametrize('vocabulary, bos', [(Letters(), 2), (vocabularies.ByteVocabulary(), 0)])
def test_generation_begins_where_documents_began(run, monkeypatch, vocabulary, bos):
  found = prompts_given(monkeypatch)
  generate.generate(**run, vocabulary=vocabulary, prompt='a', new_tokens=2)
  generate.generate(**run, vocabulary=vocabulary, prompt='a', new_tokens=2, bos_id=7)
  assert found == [[bos, 100], [7, 100]]


def test_generation_fills_the_learned_positions_and_goes_no_further(run, capsys):
  vocabulary = vocabularies.ByteVocabulary()
  generate.generate(**run, vocabulary=vocabulary, prompt='abc', new_tokens=12)
  with pytest.raises(ValueError, match=r'prompt of 4 ids .* and 13 new tokens exceed the '
                                       r'16 learned positions .*max_length.*at most 12 new tokens'):
    generate.generate(**run, vocabulary=vocabulary, prompt='abc', new_tokens=13)
  with pytest.raises(ValueError, match='shorten the prompt to at most 15 ids'):
    generate.generate(**run, vocabulary=vocabulary, prompt='a' * 30, new_tokens=1)


def test_a_prompt_of_another_vocabulary_is_refused(run):
  class Shifted(vocabularies.ByteVocabulary):
    def encode(self, text):
      return [i + 200 for i in super().encode(text)]
  with pytest.raises(ValueError, match='token id 325, but the model has vocab=260: is the '
                                       'vocabulary the one it was trained with'):
    generate.generate(**run, vocabulary=Shifted(), prompt='az', new_tokens=2)


def test_a_cache_longer_than_the_learned_positions_is_refused(run):
  with pytest.raises(ValueError, match='17 tokens exceeds max_length=16 of the learned positions'):
    run['model'].empty_cache(1, 17)
  assert toy.model(max_length=16).empty_cache(1, 17).segments.shape == (1, 17)


@pytest.mark.parametrize('seed', [99999999999999999999, 1 << 32, -1])
def test_a_seed_that_is_none_is_refused(run, seed):
  with pytest.raises(ValueError, match=rf'seed={seed} must be in \[0, 2\*\*32\)'):
    generate.generate(**run, vocabulary=vocabularies.ByteVocabulary(), seed=seed, new_tokens=2)


def test_a_prompt_that_is_no_text_is_refused(run):
  for vocabulary in (vocabularies.ByteVocabulary(), Letters()):
    with pytest.raises(ValueError, match=r"prompt 'a\\udcff' is not UTF-8 text from character 1"):
      generate.generate(**run, vocabulary=vocabulary, prompt='a\udcff')


def test_samples_stop_at_the_last_position(run):
  told, written = [], {}
  definition = run['model']
  described = toy.structure(definition)
  params = checkpoints.load_params(run['checkpoint'], described.shapes)

  class Loader:
    bos_id = 0
    vocabulary = vocabularies.ByteVocabulary

  during = decode.Run(definition, described, Loader(), '', 1,
                      lambda step, values: written.update(values), told.append)
  decode.Samples(prompts=['abc'], new_tokens=64, sampling=run['sampling'])(
      during, 1, {'params': params})
  assert list(written) == ['sample/abc'] and 'sample after update 1' in told[-1]
  decode.Samples(prompts=['a' * 20], new_tokens=4)(during, 1, {'params': params})
  assert told[-1] == 'no sample: a prompt takes all positions of the model'


def test_rows_longer_than_planned_give_a_note_where_positions_have_no_end():
  [note] = limits.notes(toy.model(max_length=64), length=65)
  assert 'rows of 65 tokens are longer than max_length=64' in note
  assert not limits.notes(toy.model(max_length=64), length=64)
  assert not limits.notes(toy.model(max_length=64, position='learned'), length=65)
  assert not limits.notes(object(), length=65)
