"""Models of gin/models with the parameters that their publications state."""

from typing import Any, NamedTuple


class Published(NamedTuple):
  """A model as published.

  Attributes:
    vocab: vocabulary entries, padding included.
    count: parameters.
    tolerance: relative; 0 where every parameter is counted.
    source: of the count, or of its rounding.
  """

  vocab: int
  count: int
  tolerance: float
  source: str


# Sizes of GPT-3 are names more than counts: table 2.1 says 350M of what comes to 356M.
_GPT3 = (50257, 0.02, 'arXiv:2005.14165, table 2.1, rounded to two or three digits')
_PYTHIA = 'total parameters of the table in the README of EleutherAI/pythia'
_DOLLY = "Pythia's count less the rows its vocabulary has more, in the table and in the head"
_CARD = 'number of parameters of the published checkpoint'


def _gpt3(count: float) -> Published:
  vocab, tolerance, source = _GPT3
  return Published(vocab, int(count), tolerance, source)


MODELS = {
  'gpt3_125m': _gpt3(125e6), 'gpt3_350m': _gpt3(350e6), 'gpt3_760m': _gpt3(760e6),
  'gpt3_1b3': _gpt3(1.3e9), 'gpt3_2b7': _gpt3(2.7e9), 'gpt3_6b7': _gpt3(6.7e9),
  'gpt3_13b': _gpt3(13e9), 'gpt3_175b': _gpt3(175e9),
  'mpt_7b': Published(50432, 6_700_000_000, 0.01, 'its model card, rounded to 6.7B'),
  'mpt_30b': Published(50432, 30_000_000_000, 0.01, 'its name, rounded'),
  'llama2_7b': Published(32000, 6_738_415_616, 0, _CARD),
  'llama2_13b': Published(32000, 13_015_864_320, 0, _CARD),
  'llama2_70b': Published(32000, 68_976_648_192, 0, _CARD),
  'llama3_8b': Published(128256, 8_030_261_248, 0, _CARD),
  'llama3_70b': Published(128256, 70_553_706_496, 0, _CARD),
  'llama3_1_8b': Published(128256, 8_030_261_248, 0, _CARD),
  'llama3_1_70b': Published(128256, 70_553_706_496, 0, _CARD),
  'llama3_405b': Published(128256, 405_853_388_800, 0, _CARD),
  'falcon_7b': Published(65024, 6_921_720_704, 0, _CARD),
  'falcon_40b': Published(65024, 41_300_000_000, 0.01,
                          'its checkpoint, rounded to 41.3B: the name leaves the table out'),
  'pythia_160m': Published(50304, 162_322_944, 0, _PYTHIA),
  'pythia_1b4': Published(50304, 1_414_647_808, 0, _PYTHIA),
  'pythia_2b8': Published(50304, 2_775_208_960, 0, _PYTHIA),
  'pythia_6b9': Published(50432, 6_857_302_016, 0, _PYTHIA),
  'pythia_12b': Published(50688, 11_846_072_320, 0, _PYTHIA),
  'dolly_v2_3b': Published(50280, 2_775_208_960 - 2 * 24 * 2560, 0, _DOLLY),
  'dolly_v2_12b': Published(50280, 11_846_072_320 - 2 * 408 * 5120, 0, _DOLLY),
  'mixtral_8x7b': Published(32000, 46_702_792_704, 0, _CARD),
  'gemma2_9b': Published(256000, 9_241_705_984, 0, _CARD),
  'qwen3_8b': Published(151936, 8_190_735_360, 0, _CARD),
  'olmo2_7b': Published(100352, 7_298_617_344, 0, _CARD),
}


def model(*, model: Any) -> Any:
  """What a configuration of gin makes of a model file."""
  return model
