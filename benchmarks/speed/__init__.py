"""Time, memory, and agreement with TRL's own trainers."""
