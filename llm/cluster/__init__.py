"""Ranks under every launcher: who they are, checks before they start, watching them."""
