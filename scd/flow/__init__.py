"""Flow matching: noise levels, the training objective, the Euler sampler and guidance."""
