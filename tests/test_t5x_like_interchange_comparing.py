"""Verifying against transformers: differences are measured, told, and decide the exit status."""

import importlib

import golden_hf
import numpy as np
import pytest

from t5x_like.interchange import arguments, comparing, importing


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


def test_the_command_takes_two_folders():
  assert arguments.split(['verify', 'theirs', 'ours', '--step=3']) == (
      'verify', ['--hf_dir=theirs', '--checkpoint=ours', '--step=3'])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['llama2_gqa', 'gpt_neox', 'falcon_rw_alibi', 'gemma3_text'])
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
    patch.setattr(comparing, '_ours', lambda *a: np.zeros((2, 24, 128)))
    with pytest.raises(SystemExit) as stopped:
      comparing.verify(str(golden_hf.FOLDER / 'llama2_gqa'), ours)
  assert stopped.value.code == 1 and 'BEYOND' in capsys.readouterr().out
