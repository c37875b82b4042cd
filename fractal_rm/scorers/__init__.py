"""Step scorers: (B, S) logits from one forward pass over prompt and response."""
