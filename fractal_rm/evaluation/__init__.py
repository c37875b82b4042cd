"""Evaluation of a step reward model's scores, and scoring of whole files."""
