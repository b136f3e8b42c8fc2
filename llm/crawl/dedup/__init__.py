"""Equal and nearly equal documents: all but the first of each go."""
