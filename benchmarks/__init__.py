"""Ingot beside its peers, on the same machine in turns. Not installed; the packages never import it."""
