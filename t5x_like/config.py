"""The only importer of gin: loads files and bindings, checks them, builds and calls a target.

Every entry module hands its function over by importable name:
`sys.exit(config.run('t5x_like.train.train'))`. What gin itself lets pass in silence is refused here
before anything is built: misspelt macros, wrong types, settings without effect, values lost to an
include; `t5x_like.checks` says what, `t5x_like.wiring` how.
"""

import copy
import importlib
import inspect
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from t5x_like import checks, commandline, distributed, failures, ginfiles, names, wiring

try:
  from gin import config as gin
  from gin import config_parser
except ImportError as error:
  raise ImportError(
    'the gin-config library is missing (a folder named gin may hide that: `import gin` finds it);'
    ' install it with: pip install gin-config'
  ) from error

_DYNAMIC = config_parser.ImportStatement(
  '__gin__.dynamic_registration', True, None, config_parser.Location(None, 0, None, '')
)
_OURS = ('t5x_like', 'models', 'partitioning', 'experiments')


class Loaded(NamedTuple):
  """What was read: bindings in order, imports of the files, and the command line as typed."""

  bindings: tuple[wiring.Binding, ...]
  imports: tuple[config_parser.ImportStatement, ...]


class _Active:
  """Gin's own state is global, so what was loaded into it and is being run is kept beside it."""

  loaded: Loaded | None = None
  target: str | None = None
  command: str = ''


class _Ambiguous(tuple[str, ...]):
  """Stands for a name that files import from different modules."""


class _Context(gin.ParseContext):
  """Gin's table of imported names, with errors that name the nearest right one."""

  def _resolve_selector(self, selector: str) -> Any:
    parts = selector.split('.')
    if parts[0] not in self._symbol_table:
      raise NameError(
        f"'{parts[0]}' (in {selector}) is not imported{names.suggest(parts[0], self._symbol_table)}"
      )
    value = self._symbol_table[parts[0]]
    if isinstance(value, _Ambiguous):
      raise ValueError(
        f"'{parts[0]}' is {' and '.join(value)} in different files; set it in a file"
      )
    for i, part in enumerate(parts[1:], 1):
      if not hasattr(value, part):
        raise ValueError(f"{'.'.join(parts[:i])} has no '{part}'{names.suggest(part, dir(value))}")
      value = getattr(value, part)
    if not callable(value):
      raise ValueError(f'{selector} is a {type(value).__name__}, not a function or class')
    return super()._resolve_selector(selector)

  def get_configurable(self, selector: str) -> Any:
    problem = ''
    try:
      if self._dynamic_registration:
        return super().get_configurable(selector)
    except NameError as error:
      problem = str(error)
    # What carries gin's own decorator goes by the end of its name, as everything does in old files.
    found = gin._REGISTRY.matching_selectors(selector)
    if len(found) > 1:
      raise ValueError(f"'{selector}' may be any of {', '.join(found)}; write more of its name")
    if not found:
      known = list(gin._REGISTRY._selector_map)
      raise ValueError(problem or f"there is no '{selector}'{names.suggest(selector, known)}")
    return gin._REGISTRY[found[0]]


def clear() -> None:
  """Forgets everything loaded."""
  gin.clear_config()
  _Active.loaded, _Active.target, _Active.command = None, None, ''


def load(
  files: Sequence[str] = (),
  bindings: Sequence[str | commandline.Binding] = (),
  search_paths: Sequence[str] = (),
  *,
  modules: Sequence[str] = (),
) -> Loaded:
  """Reads gin files, then bindings, replacing whatever was loaded before.

  Args:
    files: gin files, later ones overriding earlier ones; see `ginfiles.find`.
    bindings: `NAME = VALUE` texts, resolved with the imports of all files.
    search_paths: folders for files and includes.
    modules: modules to import, so that bindings can name what is in them.

  Raises:
    ValueError: a missing file, unreadable syntax, or a name that does not exist; says where.
  """
  clear()
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  reader = _Reader(search_paths)
  for file in files:
    reader.file(file, within=(), beside=None)
  statements = [config_parser.ImportStatement(m, False, None, _DYNAMIC.location) for m in modules]
  for binding in bindings or [None]:
    if isinstance(binding, str):
      binding = commandline.Binding(binding, f"binding '{binding}'")
    reader.command_line(binding, statements)
  _Active.loaded = Loaded(tuple(reader.bindings), (*reader.imports, *statements))
  return _Active.loaded


class _Reader:
  """Reads statements as gin's own parse_config does, remembering where each binding stands."""

  def __init__(self, search_paths: Sequence[str]):
    self.search_paths = search_paths
    self.bindings: list[wiring.Binding] = []
    self.imports: list[config_parser.ImportStatement] = []
    self.done: set[pathlib.Path] = set()

  def file(self, name: str, *, within: tuple[str, ...], beside: str | None) -> None:
    path = ginfiles.find(name, search_paths=self.search_paths, beside=beside)
    if path.resolve() in self.done:
      return  # Read once: a second include must not undo what was set in between.
    self.done.add(path.resolve())
    try:
      with open(path, encoding='utf-8') as lines:
        self.read(lines, _Context(), wiring.Where('file', str(path), str(path), within))
    except UnicodeDecodeError as error:
      raise ValueError(f'{path} is not UTF-8 text: {error}') from None

  def command_line(
    self, binding: commandline.Binding | None, modules: Sequence[config_parser.ImportStatement]
  ) -> None:
    context = _Context()
    context._enable_dynamic_registration()
    for statement in [*self.imports, *modules]:
      if not statement.module.startswith('__gin__'):
        name = statement.bound_name()
        before = context._symbol_table.get(name)
        self.import_module(context, statement, f'--module={statement.module}')
        if before is not None and before is not context._symbol_table[name]:
          origins = before if isinstance(before, _Ambiguous) else (before.__name__,)
          origins = [*origins, context._symbol_table[name].__name__]
          context._symbol_table[name] = _Ambiguous(dict.fromkeys(origins))
    if modules:
      gin._IMPORTS.update([_DYNAMIC, *modules])
    if binding is None:
      return
    text, shown = binding
    before = len(self.bindings)
    self.read(text, context, wiring.Where('command line', shown))
    if len(self.bindings) == before:
      raise ValueError(f'{shown} sets nothing; write NAME = VALUE')

  def read(self, source: Any, context: _Context, origin: wiring.Where) -> None:
    where = origin
    gin._PARSE_CONTEXTS.append(context)
    try:
      parser: Any = config_parser.ConfigParser(source, gin.ParserDelegate())
      while True:
        where = _at(origin, parser._current_token.start[0])
        statement = parser.parse_statement()
        if statement is None:
          break
        where = _at(origin, statement.location.line_num)
        self.statement(statement, context, where)
    except failures.Located:
      raise
    except SyntaxError as error:
      line = error.lineno if isinstance(error.lineno, int) else 0
      where = _at(origin, line) if line else where
      raise failures.Located(f'{where}: {failures.syntax(error, origin.origin)}') from None
    except Exception as error:
      if type(error).__name__ == 'TokenError':
        raise failures.Located(f'{where}: a bracket or quote is not closed') from None
      if isinstance(error, (ValueError, NameError, AttributeError)):
        raise failures.Located(f'{where}: {failures.plain(error)}') from None
      raise
    finally:
      gin._PARSE_CONTEXTS.remove(context)

  def statement(self, statement: Any, context: _Context, where: wiring.Where) -> None:
    if isinstance(statement, config_parser.ImportStatement):
      self.import_module(context, statement, str(where))
      gin._IMPORTS.add(statement)
      self.imports.append(statement)
    elif isinstance(statement, config_parser.IncludeStatement):
      self.file(statement.filename, within=(*where.within, where.file), beside=where.file)
    elif isinstance(statement, config_parser.BlockDeclaration):
      context.get_configurable(statement.selector)
    else:
      scope, selector, arg, value, _ = statement
      if not arg:
        scope, selector, arg = f'{scope}/{selector}' if scope else selector, wiring.MACRO, 'value'
      configurable = context.get_configurable(selector)
      if not gin._might_have_parameter(configurable.wrapped, arg):
        known = inspect.signature(configurable.wrapped).parameters
        raise ValueError(f"{selector} has no parameter '{arg}'{names.suggest(arg, known)}")
      gin.bind_parameter((scope, selector, arg), value)
      key = wiring.Key(scope, configurable.selector, arg)
      self.bindings.append(wiring.Binding(key, value, where))

  def import_module(
    self, context: _Context, statement: config_parser.ImportStatement, where: str
  ) -> None:
    try:
      context.process_import(statement)
    except ModuleNotFoundError as error:
      message = failures.no_module(statement.module, error, ours=_OURS)
      raise failures.Located(f'{where}: {message}') from None


def _at(origin: wiring.Where, line: int) -> wiring.Where:
  return origin._replace(text=f'{origin.file}:{line}') if origin.file else origin


def _references(value: Any) -> Iterator[wiring.Reference]:
  for found in gin.iterate_references(value):
    function: Any = found.configurable
    if function.wrapped is not gin._retrieve_constant:
      use = 'called' if found.evaluate else 'passed'
      yield wiring.Reference(tuple(found.scopes), function.selector, use)


def _required(value: Any) -> bool:
  if isinstance(value, gin.ConfigurableReference):
    function: Any = value.configurable
    if function.wrapped is gin._retrieve_constant:
      value = value.scoped_configurable_fn()
  return value is gin.REQUIRED


def _function(selector: str) -> Any:
  return gin._REGISTRY[selector].wrapped


def _resolve(target: str) -> Callable[..., Any]:
  module, _, name = target.rpartition('.')
  return getattr(importlib.import_module(module), name)


def _program(target: str, given: Mapping[str, Any]) -> checks.Program:
  assert _Active.loaded is not None, 'load() comes first'
  table = wiring.written(_Active.loaded.bindings)
  registered = gin._inverse_lookup(_resolve(target))
  root = wiring.Node((), registered.selector if registered else target)
  keys = [key for key in table if key.selector not in (wiring.MACRO, root.selector)]
  entries = {k.selector for k in keys if checks.is_entry(_function(k.selector))}
  # What carries gin's own decorator may be called from anywhere, so counts as used.
  decorated = [k for k in keys if not gin._REGISTRY[k.selector].import_source]
  return checks.Program(
    table=table,
    root=root,
    others=tuple(wiring.Node((), selector) for selector in sorted(entries)),
    anywhere=tuple(
      wiring.Node(tuple(k.scope.split('/')) if k.scope else (), k.selector) for k in decorated
    ),
    given=frozenset(given),
    references=_references,
    function=lambda s: _resolve(target) if s == root.selector else _function(s),
    required=_required,
  )


def call(target: str, *, action: str = 'run', **given: Any) -> Any:
  """Checks the loaded configuration for a target, builds its arguments and calls it.

  Args:
    target: importable name of a function, `package.module.function`.
    action: 'run', or 'dry_run' to hand the same arguments to the module's `dry_run` instead.
    **given: arguments that do not come from gin; they win.

  Raises:
    ValueError: everything that is wrong with the configuration, before anything is built.
  """
  if _Active.loaded is None:
    load()
  function = _resolve(target)
  if action == 'dry_run':
    module = target.rpartition('.')[0]
    function = getattr(importlib.import_module(module), 'dry_run', None)
    if function is None:
      raise ValueError(f'python -m {module} has no --dry_run')
  program = _program(target, given)
  notes = checks.check(program)
  if notes:
    print(
      'note: without effect, since another setting replaced what used it: ' + ', '.join(notes),
      file=sys.stderr,
    )
  _Active.target = target
  bound = wiring.effective(program.root, program.table)
  arguments = copy.deepcopy({arg: b.value for arg, b in bound.items() if arg not in given})
  checks.check_distinct(arguments)
  return function(**arguments, **given)


def operative() -> str:
  """Returns the configuration of the running target as gin text that replays it.

  It holds every binding with effect, here or in another entry point the files wire up, and the
  defaults of everything this run reaches, so that it still means the same when a default changes.
  '' when nothing was loaded, as when the target is called as a library.
  """
  if _Active.loaded is None or _Active.target is None:
    return ''
  program = _program(_Active.target, {})
  reached, elsewhere = program.run(), program.elsewhere()
  kept: dict[tuple[str, str], dict[str, Any]] = {}
  for key in program.table:
    if key in reached.used or key in elsewhere.used:
      kept.setdefault((key.scope, key.selector), {})[key.arg] = program.table[key][-1].value
  for node in reached.nodes:
    if node.selector in gin._REGISTRY and not node.selector.startswith('gin.'):
      bound = wiring.effective(node, program.table)
      for name, parameter in program.parameters(node.selector).items():
        if name not in bound and _writable(parameter.default):
          kept.setdefault(('', node.selector), {}).setdefault(name, parameter.default)
  return gin._config_str(kept, max_line_length=100)


def _writable(value: Any) -> bool:
  if value is inspect.Parameter.empty:
    return False
  try:
    return bool(gin.parse_value(repr(value)) == value)
  except Exception:  # Whatever its repr is, it is not a gin literal.
    return False


def record(workdir: str | os.PathLike[str]) -> pathlib.Path | None:
  """Writes the operative configuration to `workdir/config.gin`, whole or not at all.

  Returns the file, or None when nothing was loaded. See `ginfiles.write`.
  """
  if not (text := operative()):
    return None
  return ginfiles.write(workdir, text=text, command=_Active.command)


def run(
  target: str,
  argv: Sequence[str] | None = None,
  *,
  flags: Mapping[str, Callable[[str], Any]] | None = None,
) -> int:
  """Runs an entry module: reads flags, loads gin, checks, calls the target.

  Args:
    target: importable name of the function, imported only after the flags are read.
    argv: the command line without the program's name; None takes the process's own.
    flags: flags beyond the common ones, passed on as arguments when given:
      {'step': int} makes `--step 5` call `target(step=5, ...)`.

  Returns:
    The exit status: 0; 2 for what a user can mend, told in one message; 1 for a bug.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  module = target.rpartition('.')[0]
  show = 'traceback' if '--debug' in argv else 'short'
  try:
    given = commandline.parse(argv, flags)
    show = given.errors
    if given.action == 'help':
      print(commandline.usage(module, flags or {}, sys.modules['__main__'].__doc__))
      return 0
    distributed.initialize()  # Before a user's module can touch a device.
    load(given.files, given.bindings, given.search_paths, modules=given.modules)
    _Active.command = shlex.join(['python', '-m', module, *argv])
    call(target, action=given.action, **given.extra)
    return 0
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return distributed.leave(130)
  except Exception as error:
    users = {s.module.partition('.')[0] for s in (_Active.loaded.imports if _Active.loaded else ())}
    return distributed.leave(failures.report(error, show=show, ours=frozenset({*_OURS, *users})))
