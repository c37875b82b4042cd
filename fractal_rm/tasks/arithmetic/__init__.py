"""The arithmetic task: word problems in small integers, with an exact checker of every step."""
