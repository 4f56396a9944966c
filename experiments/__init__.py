"""Experiments on top of the packages: benchmarks, studies, notebooks."""
