"""Hugging Face names and settings of each family: one small module each, found by `model_type`."""
