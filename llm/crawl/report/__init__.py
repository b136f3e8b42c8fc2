"""What the stages have reported, as one page: what is left after each, what went and why, and what was damaged."""
