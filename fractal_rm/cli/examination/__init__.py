"""Checks of `fractal-rm doctor`: the user's own models and rows."""
