"""Meshes and logical-axis rules. Imports jax and nothing of ours."""
