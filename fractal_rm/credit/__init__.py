"""Step scores to rewards to advantages: plain functions on tensors."""
