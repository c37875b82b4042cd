"""FractalTrainer: a step reward model from labels on whole responses."""
