"""What is refused before anything is built, and the text that says so."""

import pytest

_REFUSED = {
  'misspelt macro': (
    ['--gin.STPES=7'],
    [
      "--gin.STPES=7: nothing uses the macro STPES; did you mean 'STEPS'?",
      'run.gin:3: STEPS is required by {u}.train.steps (run.gin:11)',
    ],
  ),
  'unused macro': (['--gin.STEPS=7', '--gin.COLOUR=7'], ['nothing uses the macro COLOUR']),
  'misspelt parameter': (
    ['--gin.STEPS=7', '--gin.{u}.adamw.b22=0.1'],
    ["{u}.adamw has no parameter 'b22'; did you mean 'b2'?"],
  ),
  'misspelt function': (
    ['--gin.STEPS=7', '--gin.{u}.adamm.b2=0.1'],
    ["{u} has no 'adamm'; did you mean 'adamw'?"],
  ),
  'module not imported': (
    ['--gin.STEPS=7', '--gin.nowhere.adamw.b2=1'],
    ["'nowhere' (in nowhere.adamw) is not imported"],
  ),
  'misspelt reference': (
    ['--gin.STEPS=7', '--gin.{u}.train.optimizer=@{u}.lionn()'],
    ["{u} has no 'lionn'; did you mean 'lion'?"],
  ),
  'text for a number': (
    ['--gin.STEPS="three"'],
    ['--gin.STEPS="three": {u}.train.steps takes int, but got \'three\''],
  ),
  'fraction for a number': (['--gin.STEPS=1e3'], ['takes int, but got 1000.0; write 1000']),
  'truth for a number': (['--gin.STEPS=True'], ['takes int, but got True']),
  'unquoted text': (
    ['--gin.STEPS=7', '--gin.{u}.train.name=abc'],
    [
      'the value cannot be read; is it a text? Then it needs quotes: \'--gin.{u}.train.name="abc"\''
    ],
  ),
  'literal choice': (
    ['--gin.STEPS=7', '--gin.{u}.Model.kind="lama"'],
    ["takes one of 'gpt', 'llama', but got 'lama'; did you mean 'llama'?"],
  ),
  'list for a tuple': (
    ['--gin.STEPS=7', '--gin.{u}.Model.windows=[1]'],
    ['but got [1]; write (1,)'],
  ),
  'wrong contents': (['--gin.STEPS=7', '--gin.{u}.Model.windows=(1, "b")'], ["but got (1, 'b')"]),
  'not called': (
    ['--gin.STEPS=7', '--gin.{u}.train.model=@{u}.Model'],
    ['takes Model, but got @{u}.Model; to pass what it builds, write @{u}.Model()'],
  ),
  'called for a number': (['--gin.STEPS=@{u}.cosine()'], ['takes int, but got @{u}.cosine()']),
  'a str for a sequence': (['--gin.STEPS=7', '--gin.{u}.train.hooks="abc"'], ["but got 'abc'"]),
  'no effect': (
    ['--gin.STEPS=7', '--gin.{u}.lion.beta=0.5'],
    ['{u}.lion.beta has no effect: nothing that {u}.train runs uses it'],
  ),
  'no effect in scope': (
    ['--gin.STEPS=7', '--gin.eval/{u}.adamw.b2=0.5'],
    ['eval/{u}.adamw.b2 has no effect', '{u}.adamw is used in: no scope'],
  ),
  'macro not set': (
    ['--gin.STEPS=%STAPES'],
    ['the macro STAPES is used by STEPS', 'but never set'],
  ),
  'missing parameter': (
    ['--gin.STEPS=7', '--gin.{u}.train.optimizer=@{u}.lion()'],
    ['{u}.lion.learning_rate is required and not set'],
  ),
  'missing file': (
    ['--gin_file=rum.gin'],
    ["there is no gin file 'rum.gin'; did you mean 'run.gin'", 'Searched:'],
  ),
  'unknown flag': (['--gin_fil=run.gin'], ['there is no flag --gin_fil; did you mean --gin_file?']),
  'stray argument': (['STEPS=4'], ["'STEPS=4' is not a flag; write --gin.STEPS=4"]),
  'no value': (['--gin.STEPS'], ['has no value; write --gin.STEPS=VALUE']),
  'unknown module': (['--module=no_such_module'], ["there is no module 'no_such_module'"]),
}


@pytest.mark.parametrize('case', _REFUSED)
def test_refused_before_anything_is_built(own, case):
  argv, expected = _REFUSED[case]
  message = own.refused('--gin_file=run.gin', *(a.format(u=own) for a in argv))
  for part in expected:
    assert part.format(u=own) in message, message


def test_everything_missing_is_listed_at_once(own):
  message = own.refused()
  for name in ('model', 'optimizer', 'steps'):
    assert f'{own}.train.{name} is required and not set' in message


_FILES = {
  'macro in a file': ('STPES = 4', ['bad.gin:3: nothing uses the macro STPES']),
  'syntax': ('WIDTH = = 3', ['bad.gin:3: the value cannot be read', 'WIDTH = = 3']),
  'bracket': ('WIDTH = (3,\n', ['bad.gin', 'not closed']),
  'twice': ('WIDTH = 3\nWIDTH = 4', ['bad.gin:3: WIDTH has no effect, bad.gin:4 sets it again']),
  'lost to include': (
    "WIDTH = 3\ninclude 'run.gin'",
    ['bad.gin:3: WIDTH has no effect, run.gin:4 sets it again; put the include above it'],
  ),
  'parameter': (
    '{u}.Model.widht = 3',
    ["bad.gin:3: {u}.Model has no parameter 'widht'; did you mean 'width'?"],
  ),
  'reference': (
    '{u}.train.model = @{u}.Modell()',
    ["bad.gin:3: {u} has no 'Modell'; did you mean 'Model'?"],
  ),
  'import': (
    'from t5x_like import wirings',
    ["bad.gin:3: t5x_like has no module 'wirings'; did you mean 'wiring'?"],
  ),
  'import of a function': (
    'from t5x_like.names import suggest',
    ["'suggest' is not a module; import t5x_like.names"],
  ),
  'nothing uses it': ('{u}.lion.beta = 0.2', ['bad.gin:3: {u}.lion.beta has no effect']),
  'include': ("include 'rum.gin'", ["bad.gin:3: there is no gin file 'rum.gin'"]),
}


@pytest.mark.parametrize('case', _FILES)
def test_errors_in_files_say_where(own, case):
  text, expected = _FILES[case]
  own.write(
    'bad.gin', f'from __gin__ import dynamic_registration\nimport {own}\n' + text.format(u=own)
  )
  files = (
    ['--gin_file=bad.gin'] if 'run.gin' in text else ['--gin_file=run.gin', '--gin_file=bad.gin']
  )
  message = own.refused(*files, '--gin.STEPS=4')
  for part in expected:
    assert part.format(u=own) in message, message
