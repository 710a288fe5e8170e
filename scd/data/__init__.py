"""Clips: video, actions, labels and latents on disk, and the order in which training sees them."""
