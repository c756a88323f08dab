"""Training: one loop, its optimizers, its schedule and its checkpoints."""
