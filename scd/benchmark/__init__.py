"""Benchmarks: seconds per frame beside their floor, training steps, and clips per second."""
