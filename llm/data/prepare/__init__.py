"""Turns text into token files; registers, inspects and verifies token files."""
