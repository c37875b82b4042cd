"""A reward model that keeps learning from the rollouts and their outcomes."""
