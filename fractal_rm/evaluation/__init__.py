"""Evaluation: what a step reward model's scores are worth, and scores for whole files."""
