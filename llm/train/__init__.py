"""The training loop, and all that a run does beside its steps."""
