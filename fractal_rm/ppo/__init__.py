"""StepPPOTrainer: PPO with a reward for every step, on the online engine of TRL."""
