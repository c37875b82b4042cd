"""A step reward model behind HTTP, and a client that stands in its place."""
