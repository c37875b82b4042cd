"""Step scorers: (B, S) logits from one forward over prompt and response."""
