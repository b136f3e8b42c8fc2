"""Other libraries' stages, each in an environment of its own: these files import nothing of Ingot."""
