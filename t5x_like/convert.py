"""Models in Hugging Face format in and out.

  python -m t5x_like.convert import HF_DIR --out DIR      a checkpoint, DIR/model.gin, DIR/hf
"""

import sys

from t5x_like import config
from t5x_like.interchange import arguments

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  command, argv = arguments.split(sys.argv[1:])
  sys.exit(config.run('t5x_like.convert.import_model', argv, flags=arguments.IMPORT))

from jax.sharding import Mesh

from partitioning import rules as rules_lib
from t5x_like.interchange import folder, importing


def import_model(hf_dir: str, *, out: str, mesh: Mesh | None = None,
                 rules: rules_lib.Rules | None = None, dtype: importing.DType = 'as_stored',
                 unknown: folder.Unknown = 'refuse') -> str:
  """Imports a folder; see `t5x_like.interchange.importing.import_folder`."""
  return importing.import_folder(hf_dir, out=out, mesh=mesh, rules=rules, dtype=dtype,
                                 unknown=unknown)
