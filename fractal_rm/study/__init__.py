"""Dense against outcome-only rewards: the same policies, prompts, rollouts and updates, over settings and seeds."""
