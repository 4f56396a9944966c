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
from t5x_like import checkpoints, decode
from t5x_like import state as state_lib


def generate(*, model: Any, mesh: Mesh, rules: rules_lib.Rules, vocabulary: Any, checkpoint: str,
             prompt: str = '', prompts: Sequence[str] = (), new_tokens: int = 128,
             sampling: decode.Sampling | None = None, seed: int = 0, step: int | None = None,
             bos_id: int = 0) -> list[str]:
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
    seed: of the draws.
    step: which checkpoint; None takes the newest good one.
    bos_id: the id every document begins with.
  Returns:
    The continuations, without the prompts.
  """
  structure = state_lib.describe(model, mesh, rules)
  params = checkpoints.load_params(checkpoint, structure.shapes, step=step, which='evaluated')
  run = decode.Generator(structure, model, eos_id=vocabulary.eos_id,
                         sampling=sampling or decode.Sampling(temperature=0.8))
  texts = list(prompts) or [prompt]
  rows = run(params, [[bos_id, *vocabulary.encode(text)] for text in texts],
             new_tokens=new_tokens, seed=seed)
  said = [vocabulary.decode(row) for row in rows]
  for text, more in zip(texts, said, strict=True):
    print(f'{text}{more}\n---')
  return said
