"""What all stages that train have in common: one Trainer, the rows of each step, checkpoints, which model is kept."""
