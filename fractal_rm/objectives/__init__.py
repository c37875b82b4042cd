"""Training objectives: plain functions on tensors, from step logits, labels and masks to losses and step labels."""
