"""Proves that a layout computes what one plain process computes."""
