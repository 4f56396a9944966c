"""t5x_like: pretrain language models on your own text, driven by gin."""

__version__ = '0.1.0'
