"""The world of `scd play` in the browser alone: graphs, weights and a page as static files."""
