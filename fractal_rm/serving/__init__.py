"""A step reward model over HTTP, and a client that can replace it."""
