"""A world model in the browser: one player, one history, up to three worlds under the same keys."""
