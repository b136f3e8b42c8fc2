"""Token files to batches: which tokens a rank trains on in each step."""
