"""Probes of a trained model: what its layers repeat at every denoising step, where its attention
goes, and what can be ablated. From them, a split of a dense model into encoder and decoder."""
