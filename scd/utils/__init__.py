"""Share what every part needs: files, paths, processes, precision, randomness, trackers."""
