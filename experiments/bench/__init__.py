"""The benchmark: how fast the machine, the step, the loop, the start and the data are."""
