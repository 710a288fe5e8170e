"""Flow matching: noise levels, the training objective, the samplers and guidance."""
