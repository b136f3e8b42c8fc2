"""The training loop, the engines, and what a run does besides its steps."""
