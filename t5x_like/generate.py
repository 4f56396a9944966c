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
from t5x_like import prompts as prompts_lib
from t5x_like import state as state_lib
from t5x_like.data import vocabularies


def generate(*, model: Any, mesh: Mesh, rules: rules_lib.Rules, checkpoint: str,
             vocabulary: Any = None, prompt: str = '', prompts: Sequence[str] = (),
             new_tokens: int = 128, sampling: decode.Sampling | None = None, seed: int = 0,
             step: int | None = None, bos_id: int | None = None,
             reading: decode.Reading = 'causal') -> list[str]:
  """Prints and returns continuations.

  Args:
    model: the model the weights belong to; needs a cache (`empty_cache`).
    mesh: any mesh.
    rules: logical axes to mesh axes.
    checkpoint: directory of checkpoints.
    vocabulary: encodes prompts and decodes ids, or what `t5x_like.data.vocabularies.load` reads one
      from; None: the tokenizer that an import keeps.
    prompt: one text to continue, or for an encoder to read; '' lets the model begin.
    prompts: several, instead of `prompt`.
    new_tokens: tokens to add at most.
    sampling: how tokens are drawn; None means temperature 0.8.
    seed: of the draws, in [0, 2**32).
    step: which checkpoint; None takes the newest good one.
    bos_id: the id every prompt begins with; None takes what training took, the vocabulary's own
      or, where it has none, the id of padding; of an import, what its own files say.
    reading: how a decoder sees its prompt: 'prefix' after training as a prefix LM.
  Returns:
    The continuations, without the prompts.
  Raises:
    ValueError: a prompt that is no text, no vocabulary or one that is not the run's, or what
      `decode.Writer` and its generators refuse.
  """
  texts = list(prompts) or [prompt]
  for text in texts:
    _check_text(text)
  vocabulary = _loaded(vocabulary, checkpoint)
  frame = prompts_lib.frame(checkpoint, vocabulary=vocabulary, bos_id=bos_id)
  provenance.check(checkpoint, vocabulary=vocabulary)
  structure = state_lib.describe(model, mesh, rules)
  run = decode.Writer(structure, model, frame=frame, reading=reading,
                      sampling=sampling or decode.Sampling(temperature=0.8))
  params = checkpoints.load_params(checkpoint, structure.shapes, step=step, which='evaluated')
  rows = run(params, [run.framed(vocabulary.encode(text)) for text in texts],
             new_tokens=new_tokens, seed=seed)
  said = [vocabulary.decode(row) for row in rows]
  for text, more in zip(texts, said, strict=True):
    between = '\n' if run.reads else ''
    print(f'{text}{between}{more}\n---')
  return said


def _loaded(vocabulary: Any, checkpoint: str) -> Any:
  if vocabulary is None:
    vocabulary = prompts_lib.kept(checkpoint)
    if vocabulary is None:
      raise ValueError(f'{checkpoint} is no import and keeps no tokenizer: set VOCABULARY to the '
                       f'path of one (generate.generate.vocabulary)')
  return vocabularies.load(vocabulary) if isinstance(vocabulary, str) else vocabulary


def _check_text(text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'the prompt {text!r} is not UTF-8 text from character {error.start} on: give '
                     f'text, for instance through iconv -t utf-8') from None
