"""Verifying against transformers: differences are measured, told, and decide the exit status."""

import contextlib
import dataclasses
import importlib
import types

import golden_hf
import jax
import numpy as np
import pytest

from models.hf import tree
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import integrity, state
from t5x_like.interchange import arguments, comparing, folder, importing


def test_the_bound_is_absolute_and_relative_and_not_a_number_is_beyond_it():
  wanted = np.array([0.0, 100.0])
  within = comparing.difference(np.array([0.9e-4, 100.001], np.float64), wanted)
  assert within.excess <= 0 and within.largest == pytest.approx(1e-3)
  assert comparing.difference(np.array([1.1e-4, 100.0]), wanted).excess > 0
  assert comparing.difference(np.array([0.0, np.nan]), wanted).excess > 0


def test_without_transformers_it_says_what_is_missing(monkeypatch):
  def absent(name):
    raise ModuleNotFoundError(f"No module named '{name}'")
  monkeypatch.setattr(importlib, 'import_module', absent)
  with pytest.raises(ValueError, match='transformers, which is not installed here .*torch'):
    comparing.verify('theirs', 'ours')


def test_made_up_rows_fit_the_model():
  batch = comparing.made_up(golden_hf.config('llama2_gqa'))
  assert batch.ours.keys() == {'inputs'} and batch.real.all()
  found = golden_hf.config('roberta_mlm')
  found = dataclasses.replace(found, types=3, stack=dataclasses.replace(found.stack, max_length=13))
  batch = comparing.made_up(found)
  assert batch.ours['inputs'].shape == (2, 11) and batch.real.sum(1).tolist() == [11, 9]
  assert set(np.unique(batch.ours['types'])) == {0, 1, 2}
  batch = comparing.made_up(golden_hf.config('t5_v1_0'), start=5)
  assert batch.ours['encoder_inputs'].shape == (2, 24) and batch.ours['inputs'].shape == (2, 12)
  assert (batch.theirs['decoder_input_ids'][:, 0] == 5).all()
  assert batch.theirs['attention_mask'].sum(1).tolist() == [24, 18]


class _Reference:
  """What `from_pretrained` gives, computed from the folder by the model itself."""

  def __init__(self, path: str, change: float = 0.0):
    self.path, self.change = path, change

  def forward(self, input_ids, attention_mask, decoder_input_ids=None, token_type_ids=None):
    found = folder.load(self.path)
    model = found.family.model(config=golden_hf.in_float32(found.config))
    made = state.describe(model, mesh_lib.make_mesh(devices=1), rules_lib.data_parallel())
    flat = tree.from_tensors(found.family, found.config, folder.leaves(made), found.stored)
    given = ({'types': token_type_ids, 'segment_ids': attention_mask, 'inputs': input_ids}
             if decoder_input_ids is None else
             {'encoder_inputs': input_ids, 'inputs': decoder_input_ids,
              'encoder_segment_ids': attention_mask})
    run = jax.jit(lambda params, given: made.module(params)(**given))
    logits = np.asarray(run(integrity.nest(flat), given)) + self.change
    return types.SimpleNamespace(logits=types.SimpleNamespace(numpy=lambda: logits))

  def __call__(self, **given):
    return self.forward(**{name: x.astype(np.int32) for name, x in given.items()})

  def float(self):
    return self

  eval = float


@pytest.mark.parametrize('name, kind', [('bert_mlm', 'BertForMaskedLM'),
                                        ('t5_v1_1', 'T5ForConditionalGeneration')])
def test_both_directions_are_compared_for_models_that_read_both_ways(
    name, kind, tmp_path, monkeypatch, capsys):
  changes: list[float] = []

  class Kind(_Reference):
    @classmethod
    def from_pretrained(cls, path, attn_implementation):
      assert attn_implementation == 'eager'
      return cls(path, changes.pop(0))

  torch = types.SimpleNamespace(tensor=np.asarray, no_grad=contextlib.nullcontext)
  monkeypatch.setattr(comparing, '_libraries',
                      lambda: (torch, types.SimpleNamespace(**{kind: Kind}, __version__='0')))
  theirs = str(golden_hf.FOLDER / name)
  ours = importing.import_folder(theirs, out=str(tmp_path / 'ours'))
  changes[:] = [0.0, 0.0]
  found = comparing.verify(theirs, ours)
  assert found['import'].excess <= 0 and found['export'].largest == 0.0
  changes[:] = [0.0, 1e-2]
  with pytest.raises(SystemExit):
    comparing.verify(theirs, ours)
  import_line, export_line = capsys.readouterr().out.splitlines()[-2:]
  assert 'within' in import_line and 'export' in export_line and 'BEYOND' in export_line


def test_the_command_takes_two_folders():
  assert arguments.split(['verify', 'theirs', 'ours', '--step=3']) == (
      'verify', ['--hf_dir=theirs', '--checkpoint=ours', '--step=3'])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [
    'llama2_gqa', 'gpt_neox', 'falcon_rw_alibi', 'gemma3_text', 'bert_mlm', 'roberta_mlm',
    't5_v1_0', 't5_v1_1'])
def test_logits_of_import_and_export_are_those_of_transformers(name, tmp_path, capsys):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  theirs = str(golden_hf.FOLDER / name)
  ours = importing.import_folder(theirs, out=str(tmp_path / 'ours'))
  found = comparing.verify(theirs, ours)
  assert found['import'].excess <= 0 and found['export'].largest == 0.0
  assert 'import: largest difference' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_another_model_ends_with_status_one(tmp_path, capsys):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  ours = importing.import_folder(str(golden_hf.FOLDER / 'llama2_gqa'), out=str(tmp_path / 'ours'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(comparing, '_ours', lambda *a: np.zeros((48, 128)))
    with pytest.raises(SystemExit) as stopped:
      comparing.verify(str(golden_hf.FOLDER / 'llama2_gqa'), ours)
  assert stopped.value.code == 1 and 'BEYOND' in capsys.readouterr().out
