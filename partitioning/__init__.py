"""Meshes, logical-axis rules and (later) the ahead-of-time planner. Imports jax and nothing of ours."""
