"""Record video and actions from ViZDoom's `my_way_home` maze, the default data set."""
