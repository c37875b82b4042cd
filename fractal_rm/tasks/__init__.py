"""Tasks: problems with exact or given answers, their checkers, and base policies."""
