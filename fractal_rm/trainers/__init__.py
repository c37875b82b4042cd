"""Trainers: a step reward model from response labels, and PPO with its scores as dense rewards."""
