"""What both trainers share with transformers: runs, checkpoints, logs, length buckets, cards."""
