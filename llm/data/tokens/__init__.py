"""Token files and their manifest, read without conversion."""
