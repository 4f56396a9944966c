"""Models of gin/models with the parameters that their publications state.

Every count is exact. Where a publication states a rounded number only, the count is that of the
published hyper-parameters, and `printed` is what it must round to.
"""

from typing import Any, NamedTuple


class Published(NamedTuple):
  """A model as published.

  Attributes:
    vocab: vocabulary entries, padding included.
    count: parameters, a table that is also the head counted once.
    source: of the count.
    printed: the rounded number of its publication, such as '2.7B'; '' where it states the count.
  """

  vocab: int
  count: int
  source: str
  printed: str = ''


_CARD = 'number of parameters of the published checkpoint'
_PYTHIA = 'total parameters of the table in the README of EleutherAI/pythia'
_DOLLY = "Pythia's count less the rows its vocabulary has more, in the table and in the head"
_MPT = 'number of parameters of the published checkpoint; its card rounds up to 6.7B'
_FALCON = 'number of parameters of the published checkpoint, its table counted once'
_GEMMA3 = ('number of parameters of the published checkpoint, less 416,866,032 that read images '
           'and 2,950,272 that project them')
_HEAD = ('number of parameters of the published checkpoint without heads, its pooler replaced by '
         'the head of masked tokens')
_BARK = "its config; the card's {} are the matrices of the blocks, {} of them"


def _gpt3(printed: str, layers: int, embed: int) -> Published:
  """A row of table 2.1: vocabulary 50,257, rows of 2,048, biases everywhere, a tied head."""
  block = 12 * embed**2 + 13 * embed
  return Published(50257, (50257 + 2048) * embed + layers * block + 2 * embed,
                   'arXiv:2005.14165, layers and widths of table 2.1', printed)


def _masked(vocab: int, embed: int, count: int) -> Published:
  """Of a count with a pooler, a square layer with a bias, as the head of masked tokens has one too.

  That head also has a norm and a bias for each entry of the vocabulary.
  """
  return Published(vocab, count + 2 * embed + vocab, _HEAD)


def _bark(printed: str, layers: int, embed: int) -> Published:
  """No biases, a scale in each norm, and a head of its own."""
  matrices = layers * 12 * embed**2
  around = (129600 + 1024 + 10048 + 2 * layers + 1) * embed
  return Published(129600, matrices + around, _BARK.format(printed, f'{matrices:,}'))


MODELS = {
  'gpt2_small': Published(50257, 124_439_808, _CARD),
  # What the table calls 350M has 356M by its own layers and width.
  'gpt3_125m': _gpt3('125M', 12, 768), 'gpt3_350m': _gpt3('', 24, 1024),
  'gpt3_760m': _gpt3('760M', 24, 1536), 'gpt3_1b3': _gpt3('1.3B', 24, 2048),
  'gpt3_2b7': _gpt3('2.7B', 32, 2560), 'gpt3_6b7': _gpt3('6.7B', 32, 4096),
  'gpt3_13b': _gpt3('13B', 40, 5120), 'gpt3_175b': _gpt3('175B', 96, 12288),
  'gptj_6b': Published(50400, 6_050_882_784, _CARD),
  'mpt_7b': Published(50432, 6_649_286_656, _MPT),
  'mpt_30b': Published(50432, 29_957_200_896, _CARD, '30B'),
  'llama2_7b': Published(32000, 6_738_415_616, _CARD),
  'llama2_13b': Published(32000, 13_015_864_320, _CARD),
  'llama2_70b': Published(32000, 68_976_648_192, _CARD),
  'llama3_8b': Published(128256, 8_030_261_248, _CARD),
  'llama3_70b': Published(128256, 70_553_706_496, _CARD),
  'llama3_1_8b': Published(128256, 8_030_261_248, _CARD),
  'llama3_1_70b': Published(128256, 70_553_706_496, _CARD),
  'llama3_405b': Published(128256, 405_853_388_800, _CARD),
  'falcon_7b': Published(65024, 6_921_720_704, _FALCON),
  'falcon_40b': Published(65024, 41_303_293_952, _FALCON),
  'pythia_70m': Published(50304, 70_426_624, _PYTHIA),
  'pythia_160m': Published(50304, 162_322_944, _PYTHIA),
  'pythia_410m': Published(50304, 405_334_016, _PYTHIA),
  'pythia_1b': Published(50304, 1_011_781_632, _PYTHIA),
  'pythia_1b4': Published(50304, 1_414_647_808, _PYTHIA),
  'pythia_2b8': Published(50304, 2_775_208_960, _PYTHIA),
  'pythia_6b9': Published(50432, 6_857_302_016, _PYTHIA),
  'pythia_12b': Published(50688, 11_846_072_320, _PYTHIA),
  'dolly_v2_3b': Published(50280, 2_775_208_960 - 2 * 24 * 2560, _DOLLY),
  'dolly_v2_7b': Published(50280, 6_857_302_016 - 2 * 152 * 4096, _DOLLY),
  'dolly_v2_12b': Published(50280, 11_846_072_320 - 2 * 408 * 5120, _DOLLY),
  'mistral_7b': Published(32000, 7_241_732_096, _CARD),
  'mixtral_8x7b': Published(32000, 46_702_792_704, _CARD),
  'gemma2_9b': Published(256000, 9_241_705_984, _CARD),
  'gemma3_1b': Published(262144, 999_885_952, _CARD),
  'gemma3_4b': Published(262208, 4_300_079_472 - 416_866_032 - 2_950_272, _GEMMA3),
  'qwen2_7b': Published(152064, 7_615_616_512, _CARD),
  'qwen3_8b': Published(151936, 8_190_735_360, _CARD),
  'olmo2_7b': Published(100352, 7_298_617_344, _CARD),
  'phi3_mini': Published(32064, 3_821_079_552, _CARD),
  'bark_semantic': _bark('300M', 24, 1024), 'bark_semantic_small': _bark('80M', 12, 768),
  'bert_base': _masked(30522, 768, 109_482_240), 'bert_large': _masked(30522, 1024, 335_141_888),
  'roberta_base': _masked(50265, 768, 124_645_632),
  'roberta_large': _masked(50265, 1024, 355_359_744),
  't5_small': Published(32128, 60_506_624, _CARD),
  't5_base': Published(32128, 222_903_552, _CARD),
  't5_large': Published(32128, 737_668_096, _CARD),
  't5_3b': Published(32128, 2_851_598_336, _CARD),
  't5_11b': Published(32128, 11_307_321_344, _CARD),
  't5_1_1_small': Published(32128, 76_961_152, _CARD),
  't5_1_1_base': Published(32128, 247_577_856, _CARD),
  't5_1_1_large': Published(32128, 783_150_080, _CARD),
  't5_1_1_xl': Published(32128, 2_849_757_184, _CARD),
  't5_1_1_xxl': Published(32128, 11_135_332_352, _CARD),
}


def model(*, model: Any) -> Any:
  """What a configuration of gin makes of a model file."""
  return model
