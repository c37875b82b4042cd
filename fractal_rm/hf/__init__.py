"""What both trainers share with transformers: checkpoints, logs, length buckets, processes, cards."""
