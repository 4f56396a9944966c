"""The golden references of tests/golden/hf: models, parameters, inputs, how they are compared."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from models.hf import family as family_lib
from models.hf import files, table, tree
from models.hf.settings import Settings
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import integrity, state

FOLDER = pathlib.Path(__file__).parent / 'golden/hf'
# Of the references' own README: never looser.
ABSOLUTE, RELATIVE, OF_LOSS, OF_NORMS = 1e-4, 1e-5, 1e-5, 1e-4


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
  """Inputs and reference outputs of a fixture."""
  return dict(np.load(FOLDER / name / 'io.npz'))


def settings(name: str, file: str = 'config.json') -> Settings:
  """A fixture's settings."""
  return Settings(json.loads((FOLDER / name / file).read_text()), f'{name}/{file}')


def family(name: str) -> family_lib.Family:
  """A fixture's family."""
  return family_lib.of_settings(settings(name).values)


@functools.cache
def config(name: str):
  """A fixture's configuration, in float32."""
  return in_float32(family(name).read(settings(name)))


def in_float32(found, **changes):
  """A configuration computing in float32."""
  return changed(found, dtype='float32', **changes)


def changed(found, **changes):
  """A configuration, or the stacks inside it, with other settings."""
  stacks = {field.name: changed(value, **changes) for field in dataclasses.fields(found)
            if dataclasses.is_dataclass(value := getattr(found, field.name))
            and hasattr(value, 'layers')}
  return dataclasses.replace(found, **(stacks or changes))


@functools.cache
def stored(name: str) -> dict[str, files.Stored]:
  """A fixture's tensors."""
  return files.tensors(str(FOLDER / name))


def leaves(structure: state.Structure) -> dict[str, table.Leaf]:
  """Our parameters as a table sees them."""
  return {row['path']: table.Leaf(row['axes'], row['shape']) for row in structure.rows()}


def lenient() -> rules_lib.Rules:
  """fsdp and tensor rules that leave a dimension whole where two devices do not divide it."""
  split = [(name, axis) for name in ('vocab', 'heads', 'kv_heads', 'mlp')
           for axis in ('tensor', None)]
  return rules_lib.custom(params=[*split, ('embed', 'fsdp'), ('embed', None)], activations=split)


def structure(name: str, *, devices: int = 1, **changes) -> state.Structure:
  """A fixture's model, on one device or on fsdp 2 x tensor 2 x data 2."""
  mesh = (mesh_lib.make_mesh(devices=1) if devices == 1
          else mesh_lib.make_mesh(devices=8, data=2, fsdp=2, tensor=2))
  definition = family(name).model(config=changed(config(name), **changes))
  return state.describe(definition, mesh, lenient())


def params(name: str, made: state.Structure):
  """A fixture's parameters, sharded as the structure says."""
  flat = tree.from_tensors(family(name), config(name), leaves(made), stored(name))
  return jax.tree.map(lambda x, like: jax.device_put(jnp.asarray(x), like.sharding),
                      integrity.nest(flat), made.shapes)


def close(found, wanted, what: str) -> None:
  """Compares numbers such as logits."""
  np.testing.assert_allclose(np.asarray(found), wanted, atol=ABSOLUTE, rtol=RELATIVE, err_msg=what)


def gradients_close(name: str, made: state.Structure, grads, prefix: str = '') -> None:
  """Compares the norms of all gradients under the names the reference has for them."""
  flat = {path: np.asarray(value) for path, value in state.path_dict(grads).items()}
  found = dict(tree.to_tensors(family(name), config(name), leaves(made),
                               lambda path, index: flat[path][index]))
  expected = outputs(name)
  names = [str(n) for n in expected[f'{prefix}param_grad_names']]
  assert set(names) <= found.keys()
  norms = np.array([np.linalg.norm(found[n].astype(np.float64)) for n in names])
  np.testing.assert_allclose(norms, expected[f'{prefix}param_grad_norms'], rtol=OF_NORMS,
                             atol=1e-6, err_msg=str(names))
  total = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in flat.values()))
  np.testing.assert_allclose(total, expected[f'{prefix}grad_norm'], rtol=OF_NORMS)
