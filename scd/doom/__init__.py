"""Real video by default: ViZDoom's `my_way_home` maze, recorded with the actions that drove it."""
