"""The loop, its strategies, checkpoints and optimizers; knows FusionModel, never a concrete one."""
