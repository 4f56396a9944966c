"""Continues prompts with trained weights: `python -m t5x_like.generate --prompt TEXT ...`."""

import sys

from t5x_like import config

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  sys.exit(config.run('t5x_like.generate.generate',
                      flags={'prompt': str, 'new_tokens': int, 'seed': int, 'step': int}))

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from partitioning import rules as rules_lib
from t5x_like import checkpoints, decode, provenance
from t5x_like import state as state_lib


def generate(*, model: Any, mesh: Mesh, rules: rules_lib.Rules, vocabulary: Any, checkpoint: str,
             prompt: str = '', prompts: Sequence[str] = (), new_tokens: int = 128,
             sampling: decode.Sampling | None = None, seed: int = 0, step: int | None = None,
             bos_id: int | None = None) -> list[str]:
  """Prints and returns continuations.

  Args:
    model: the model the weights belong to; needs a cache (`empty_cache`).
    mesh: any mesh.
    rules: logical axes to mesh axes.
    vocabulary: encodes prompts and decodes ids; see `t5x_like.data.vocabularies`.
    checkpoint: directory of checkpoints.
    prompt: one text to continue; '' lets the model begin.
    prompts: several, instead of `prompt`.
    new_tokens: tokens to add at most.
    sampling: how tokens are drawn; None means temperature 0.8.
    seed: of the draws, in [0, 2**32).
    step: which checkpoint; None takes the newest good one.
    bos_id: the id every document begins with; None takes what training took, the vocabulary's own
      or, where it has none, the id of padding.
  Returns:
    The continuations, without the prompts.
  Raises:
    ValueError: a prompt that is no text, a vocabulary that is not the run's, or what
      `decode.Generator` refuses.
  """
  texts = list(prompts) or [prompt]
  for text in texts:
    _check_text(text)
  own = vocabulary.pad_id if vocabulary.bos_id is None else vocabulary.bos_id
  begin: int = own if bos_id is None else bos_id
  provenance.check(checkpoint, vocabulary=vocabulary)
  structure = state_lib.describe(model, mesh, rules)
  params = checkpoints.load_params(checkpoint, structure.shapes, step=step, which='evaluated')
  run = decode.Generator(structure, model, eos_id=vocabulary.eos_id,
                         sampling=sampling or decode.Sampling(temperature=0.8))
  rows = run(params, [[begin, *vocabulary.encode(text)] for text in texts],
             new_tokens=new_tokens, seed=seed)
  said = [vocabulary.decode(row) for row in rows]
  for text, more in zip(texts, said, strict=True):
    print(f'{text}{more}\n---')
  return said


def _check_text(text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'the prompt {text!r} is not UTF-8 text from character {error.start} on: give '
                     f'text, for instance through iconv -t utf-8') from None
