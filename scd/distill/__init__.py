"""Post-training: consistency distillation, and distribution matching on a model's own rollouts."""
