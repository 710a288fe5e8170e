"""Training: one loop for every task, checkpoints, and what each task trains."""
