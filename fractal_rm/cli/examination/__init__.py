"""What `fractal-rm doctor` examines: the installation, the user's own models and rows."""
