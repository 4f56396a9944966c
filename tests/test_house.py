"""The rules of the house, held by reading the source: sizes, layers, words, documented commands.

The numbers are ratchets: they may only improve.
"""

import ast
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_LAYERS = ('t5x_like', 'models', 'partitioning', 'experiments')
_MAX_FILE, _LONG, _LONGEST, _LONG_SHARE = 400, 60, 120, 0.02

# Who may import whom, by the longest matching name; a package may always import itself.
_ALLOWED = {
  'partitioning': set(),
  'models': {'partitioning'},
  't5x_like.data': {'t5x_like.names'},
  't5x_like': {'t5x_like.data', 't5x_like.interchange', 'models', 'partitioning'},
  't5x_like.interchange': {'t5x_like', 't5x_like.data', 'models', 'partitioning'},
  't5x_like.serve': {'t5x_like', 't5x_like.data', 'models', 'partitioning'},
  't5x_like.tune': {'t5x_like', 't5x_like.data', 'models', 'partitioning'},
  'experiments': {
    't5x_like',
    't5x_like.data',
    't5x_like.interchange',
    't5x_like.serve',
    't5x_like.tune',
    'models',
    'partitioning',
  },
}
# The core in order: a module may import those before it in a chain, never those after it.
_CHAINS = [
  ('t5x_like.state', 't5x_like.losses', 't5x_like.train'),
  ('t5x_like.state', 't5x_like.optim', 't5x_like.train'),
  ('t5x_like.state', 't5x_like.checkpoints', 't5x_like.train'),
  ('t5x_like.state', 't5x_like.metrics', 't5x_like.train'),
  ('t5x_like.state', 't5x_like.decode', 't5x_like.evaluate'),
]
_NEVER = {'t5x_like.train': {'t5x_like.evaluate', 't5x_like.decode'}}
_SEQIO = {f't5x_like/data/{m}.py' for m in ('tasks', 'prepare', 'live', 'seqio_vocabularies')}
_ONLY_IN = {
  'gin': {'t5x_like/config.py'},
  'tensorflow': _SEQIO,
  'tensorflow_datasets': _SEQIO,
  'seqio': _SEQIO,
  'torch': {'experiments/bench/torch_reference.py'},
  'transformers': set(),
}


def _sources() -> list[pathlib.Path]:
  return sorted(f for name in _LAYERS for f in (_ROOT / name).rglob('*.py'))


def _all_python() -> list[pathlib.Path]:
  return [*_sources(), *sorted((_ROOT / 'tests').rglob('*.py')), _ROOT / 'setup.py']


def _name(file: pathlib.Path) -> str:
  parts = file.relative_to(_ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _tree(file: pathlib.Path) -> ast.Module:
  return ast.parse(file.read_text(encoding='utf-8'), str(file))


def _known_modules() -> set[str]:
  return {_name(f) for f in _sources()}


def _imports(tree: ast.AST, known: set[str]) -> set[str]:
  """Returns the modules imported; `from package import module` counts as the module."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'relative import on line {node.lineno}'
      base = node.module or ''
      found.update(f'{base}.{a.name}' if f'{base}.{a.name}' in known else base for a in node.names)
  return found


def _layer(module: str) -> str | None:
  matching = [name for name in _ALLOWED if module == name or module.startswith(name + '.')]
  return max(matching, key=len, default=None)


def _functions(tree: ast.AST):
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      first = node.body[0]
      doc = ast.get_docstring(node) is not None
      documented = (first.end_lineno or 0) - first.lineno + 1 if doc else 0
      yield node.name, (node.end_lineno or 0) - node.lineno + 1 - documented


def test_files_are_short():
  long = {
    str(f.relative_to(_ROOT)): n
    for f in _all_python()
    if (n := len(f.read_text().splitlines())) >= _MAX_FILE
  }
  assert not long, f'split by meaning: {long}'


def test_functions_are_short():
  lengths = {
    f'{f.relative_to(_ROOT)}:{name}': n for f in _all_python() for name, n in _functions(_tree(f))
  }
  over = {name: n for name, n in lengths.items() if n > _LONG}
  assert not {name: n for name, n in over.items() if n > _LONGEST}
  assert len(over) <= _LONG_SHARE * len(lengths), over


def test_layers_import_downwards_only():
  known, wrong = _known_modules(), []
  for file in _sources():
    layer = _layer(_name(file))
    assert layer, f'{file} is in no layer'
    for module in _imports(_tree(file), known):
      other = _layer(module)
      names_core = module if module in known else None
      if other and other != layer and not {other, names_core} & _ALLOWED[layer]:
        wrong.append(f'{_name(file)} imports {module}')
  assert not wrong


def test_core_modules_import_in_order():
  known, wrong = _known_modules(), []
  graph = {_name(f): _imports(_tree(f), known) & known for f in _sources()}
  forbidden = dict(_NEVER)
  for chain in _CHAINS:
    for low, high in itertools.combinations(chain, 2):
      forbidden[low] = forbidden.get(low, set()) | {high}
  for module, others in forbidden.items():
    wrong += [f'{module} imports {o}' for o in graph.get(module, set()) & others]
  assert not wrong


def test_no_import_cycles():
  known = _known_modules()
  graph = {_name(f): _imports(_tree(f), known) & known for f in _sources()}
  done: set[str] = set()

  def visit(module: str, path: tuple[str, ...]) -> None:
    assert module not in path, ' -> '.join([*path[path.index(module) :], module])
    if module not in done:
      for other in sorted(graph[module]):
        visit(other, (*path, module))
      done.add(module)

  for module in graph:
    visit(module, ())


def test_libraries_stay_where_they_belong():
  known, wrong = _known_modules(), []
  for file in _sources():
    where = str(file.relative_to(_ROOT))
    for module in _imports(_tree(file), known):
      places = _ONLY_IN.get(module.partition('.')[0])
      if places is not None and where not in places:
        wrong.append(f'{where} imports {module}')
  assert not wrong


def test_our_code_is_imported_at_the_top_only():
  known, wrong = _known_modules(), []
  for file in _sources():
    for node in ast.walk(_tree(file)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        ours = {m for m in _imports(node, known) if m.partition('.')[0] in _LAYERS}
        wrong += [f'{_name(file)}.{node.name} imports {m}' for m in ours]
  assert not wrong


def test_packages_hold_nothing_but_a_docstring():
  for file in _sources():
    if file.name == '__init__.py':
      body = _tree(file).body
      assert ast.get_docstring(_tree(file)), f'{file} has no docstring'
      extra = [
        n for n in body[1:] if not (isinstance(n, ast.Assign) and '__version__' in ast.unparse(n))
      ]
      assert not extra, f'{file} holds more than a docstring'


def test_no_forbidden_files():
  assert not [f for f in _all_python() if f.stem in ('utils', 'util', 'helpers', 'misc', 'common')]
  assert not list((_ROOT / 'tests').rglob('__init__.py')) + list((_ROOT / 'gin').rglob('*.py'))


def test_public_functions_are_documented():
  missing = []
  for file in _sources():
    tree = _tree(file)
    if not ast.get_docstring(tree):
      missing.append(f'{_name(file)} (the module)')
    for node in tree.body:
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
        if not ast.get_docstring(node):
          missing.append(f'{_name(file)}.{node.name}')
  assert not missing


def test_arguments_are_keyword_only_after_the_first():
  """A handful may be given by position, as in attention(q, k, v, mask, bias); beyond, by name."""
  wrong = []
  for file in _sources():
    for node in ast.walk(_tree(file)):
      if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
        positional = [a.arg for a in node.args.args if a.arg not in ('self', 'cls')]
        if len(positional) > 5:
          wrong.append(f'{_name(file)}.{node.name}({", ".join(positional)})')
  assert not wrong


def test_notebooks_import_packages_only():
  """A notebook holds no code that a package should hold: no function or class of its own."""
  for file in (_ROOT / 'experiments').rglob('*.ipynb'):
    cells = json.loads(file.read_text())['cells']
    for cell in (c for c in cells if c['cell_type'] == 'code'):
      lines = [re.sub(r'^\s*[!%].*', 'pass', line) for line in ''.join(cell['source']).split('\n')]
      kinds = {type(n) for n in ast.walk(ast.parse('\n'.join(lines)))}
      assert not kinds & {ast.FunctionDef, ast.ClassDef}, f'{file.name}: {lines[0]}'


# Spelt so that this file does not hold them.
_WORDS = [
  'a' + 'gentic',
  'work' + 'place',
  'sub' + 'agent',
  'py' + 'thonhosted',
  'pypi' + '.org',
  '/wor' + 'k/',
  '/tm' + 'p/v/',
  '/op' + 't/pypi',
  'language' + ' model assistant',
]


def _tracked() -> list[pathlib.Path]:
  done = subprocess.run(['git', 'ls-files', '-z'], cwd=_ROOT, capture_output=True, text=True)
  if done.returncode:
    return [f for f in _all_python()]
  return [p for name in done.stdout.split('\0') if name and (p := _ROOT / name).is_file()]


def test_no_forbidden_words():
  found = []
  for file in _tracked():
    try:
      text = file.read_text(encoding='utf-8').lower()
    except UnicodeDecodeError:
      continue  # Binary: a golden array.
    found += [f'{file.relative_to(_ROOT)}: {word}' for word in _WORDS if word in text]
  assert not found


def _python(code: str) -> str:
  done = subprocess.run([sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_importing_the_trainer_loads_no_tensorflow():
  heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch', 'transformers', 'keras', 'wandb'}
  code = f'import sys, t5x_like.train; print(sorted({heavy!r} & set(sys.modules)))'
  assert _python(code) == '[]'


def _entries() -> list[str]:
  return [
    _name(f) for f in _sources() if re.search(r'^ *sys\.exit\(config\.run\(', f.read_text(), re.M)
  ]


@pytest.mark.parametrize('module', _entries())
def test_entry_points_answer_help_before_anything_slow_is_loaded(module):
  code = (
    'import atexit, runpy, sys\n'
    "slow = {'jax', 'tensorflow', 'flax'}\n"
    "atexit.register(lambda: print('slow:', sorted(slow & set(sys.modules))))\n"
    f"sys.argv = ['x', '--help']; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
  )
  printed = _python(code)
  assert f'python -m {module}' in printed and printed.endswith('slow: []'), printed[-200:]


def test_there_are_entry_points():
  assert {'t5x_like.train', 't5x_like.prepare', 't5x_like.evaluate'} <= set(_entries())


# Every command that the documentation shows, as it is written there, and the test that runs it.
_BENCH = 'tests/test_experiments_bench.py::test_script_measures_the_data_from_anywhere'
_DRY_RUN = 'tests/test_t5x_like_interchange_planning.py::test_commands_of_the_documentation'
_LAUNCH = 'tests/test_docs_launch.py::test_command_of_the_documentation'
_COMMANDS: dict[str, str] = {
  './scripts/launch_local --processes 2 -- python -m t5x_like.train '
  '--gin_file=runs/a/config.gin': _LAUNCH,
  './scripts/launch_tpu_pod run a --zone us-east5-b --accelerator_type v6e-16 --spot '
  "--prepare 'mountpoint -q /shared || sudo mount --mkdir 10.0.0.2:/share /shared' -- "
  'python -m t5x_like.train --gin_file=gin/runs/pretrain.gin '
  r'--gin_file=gin/models/decoder_125m.gin --gin.MODEL_DIR=\"/shared/a\" '
  r'--gin.STORE_DIR=\"/shared/stores\" --gin.SOURCES=\"text\" --gin.TRAIN_STEPS=2000': _LAUNCH,
  './scripts/launch_tpu_pod status a --zone us-east5-b': _LAUNCH,
  './scripts/launch_tpu_pod logs a --zone us-east5-b': _LAUNCH,
  './scripts/launch_tpu_pod stop a --zone us-east5-b': _LAUNCH,
  './scripts/launch_gke a --image us-docker.pkg.dev/project/repository/t5x_like:1 '
  '--accelerator tpu-v6e-slice --topology 4x4 --volume share:/shared -- python -m '
  't5x_like.train --gin_file=runs/pretrain.gin --gin_file=models/decoder_125m.gin '
  r'--gin.MODEL_DIR=\"/shared/a\" --gin.STORE_DIR=\"/shared/stores\" '
  r'--gin.SOURCES=\"text\" --gin.TRAIN_STEPS=2000': _LAUNCH,
  './scripts/launch_gke a --xpk --cluster c --tpu_type v6e-16 --image '
  'us-docker.pkg.dev/project/repository/t5x_like:1 -- python -m t5x_like.train '
  '--gin_file=runs/pretrain.gin --gin_file=models/decoder_125m.gin '
  r'--gin.MODEL_DIR=\"/shared/a\" --gin.STORE_DIR=\"/shared/stores\" '
  r'--gin.SOURCES=\"text\" --gin.TRAIN_STEPS=2000': _LAUNCH,
  './scripts/launch_slurm a --nodes 2 --gpus_per_node 8 --time 4:00:00 --partition gpu '
  '-- python -m t5x_like.train --gin_file=gin/runs/pretrain.gin '
  r'--gin_file=gin/models/decoder_125m.gin --gin.MODEL_DIR=\"/shared/a\" '
  r'--gin.STORE_DIR=\"/shared/stores\" --gin.SOURCES=\"text\" --gin.TRAIN_STEPS=200000': _LAUNCH,
  'python -m t5x_like.convert import llama --out runs/llama':
    'tests/test_t5x_like_interchange_importing.py::test_commands_of_the_documentation',
  'python -m t5x_like.convert export runs/llama --out llama-again':
    'tests/test_t5x_like_interchange_importing.py::test_commands_of_the_documentation',
  'python -m t5x_like.convert import llama --out runs/llama --dry_run': _DRY_RUN,
  'python -m t5x_like.convert export runs/llama --out llama-again --dry_run': _DRY_RUN,
  './scripts/quickstart': 'tests/test_scripts.py::test_quickstart_from_a_folder_of_text',
  './scripts/test': '.ci/run runs it',
  './scripts/setup dev': 'tests/test_packaging.py::test_setup_refuses_another_python_clearly',
  './.ci/run': 'it is what runs the tests',
  './scripts/bench': _BENCH,
  './scripts/bench --quick': _BENCH,
  './scripts/bench --only startup,step --out bench.json': _BENCH,
}


# Pages whose commands a test reads there and runs all: test_readme.py, test_docs_objectives.py.
_PAGES = ('README.md', 'objectives.md')


def _documented_commands() -> dict[str, str]:
  """Returns each command line in a bash block of the documentation, with the file that shows it."""
  found = {}
  files = [_ROOT / 'README.md', _ROOT / 'CONTRIBUTING.md', *sorted((_ROOT / 'docs').rglob('*.md'))]
  for file in (f for f in files if f.exists()):
    for block in re.findall(r'```(?:bash|sh)\n(.*?)```', file.read_text(), re.S):
      joined = block.replace('\\\n', ' ')
      for line in joined.splitlines():
        line = ' '.join(line.split(' #')[0].split())
        if file.name in _PAGES and line.startswith('python -m'):
          continue
        if line and not line.startswith('#'):
          found[line] = file.name
  return found


def test_every_documented_command_is_run_by_a_test():
  documented = _documented_commands()
  untested = {line: file for line, file in documented.items() if line not in _COMMANDS}
  assert not untested, 'add each to _COMMANDS with the test that runs it'
  assert not set(_COMMANDS) - set(documented), 'no longer documented: remove from _COMMANDS'


@pytest.mark.parametrize('command', _COMMANDS)
def test_the_test_named_for_a_command_exists(command):
  test = re.fullmatch(r'(tests/\w+\.py)::(\w+)', _COMMANDS[command])
  if test:
    names = {name for name, _ in _functions(_tree(_ROOT / test[1]))}
    assert test[2] in names, f'{command}: there is no {_COMMANDS[command]}'
