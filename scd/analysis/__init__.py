"""Probes of a trained model: what its layers repeat at every step, where its attention goes, and
what can be cut. From them a split of a dense model into encoder and decoder."""
