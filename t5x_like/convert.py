"""Models in Hugging Face format in and out.

  python -m t5x_like.convert import HF_DIR --out DIR      a checkpoint, DIR/model.gin, DIR/hf
  python -m t5x_like.convert export DIR --out HF_DIR      .safetensors, config.json, tokenizer
  python -m t5x_like.convert verify HF_DIR DIR            our logits beside those of transformers

With --dry_run, import and export read settings and headers only, show every parameter with its
tensors, and list all that is wrong; nothing is written.
"""

import sys

from t5x_like import config
from t5x_like.interchange import arguments

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  command, argv = arguments.split(sys.argv[1:])
  if command == 'export':
    sys.exit(config.run('t5x_like.convert.export_model', argv, flags=arguments.EXPORT))
  if command == 'verify':
    sys.exit(config.run('t5x_like.convert.verify', argv, flags=arguments.VERIFY))
  sys.exit(config.run('t5x_like.convert.import_model', argv, flags=arguments.IMPORT))

from typing import Any, Literal

from jax.sharding import Mesh

from partitioning import rules as rules_lib
from t5x_like.interchange import comparing, exporting, folder, importing, planning


def import_model(hf_dir: str, *, out: str, mesh: Mesh | None = None,
                 rules: rules_lib.Rules | None = None, dtype: importing.DType = 'as_stored',
                 unknown: folder.Unknown = 'refuse') -> str:
  """Imports a folder; see `t5x_like.interchange.importing.import_folder`."""
  return importing.import_folder(hf_dir, out=out, mesh=mesh, rules=rules, dtype=dtype,
                                 unknown=unknown)


def export_model(checkpoint: str, *, out: str, model: Any = None,
                 dtype: exporting.DType = 'as_imported', shard_size: str = '5GB',
                 spelling: Literal['current', 'older'] = 'current', family: str | None = None,
                 step: int | None = None, which: exporting.Which = 'evaluated') -> str:
  """Exports a checkpoint; see `t5x_like.interchange.exporting.export`."""
  return exporting.export(checkpoint, out=out, model=model, dtype=dtype, shard_size=shard_size,
                          spelling=spelling, family=family, step=step, which=which)


def verify(hf_dir: str, checkpoint: str, *, step: int | None = None
           ) -> dict[str, comparing.Difference]:
  """Compares a checkpoint with transformers; see `t5x_like.interchange.comparing.verify`."""
  return comparing.verify(hf_dir, checkpoint, step=step)


def dry_run(hf_dir: str | None = None, **settings: Any) -> list[planning.Parameter]:
  """Shows what an import or an export would do; see `t5x_like.interchange.planning`."""
  if hf_dir is None:
    return planning.show_export(**settings)
  if 'checkpoint' in settings:
    raise ValueError('verify writes nothing and has no --dry_run; leave it out')
  return planning.show_import(hf_dir, **settings)
