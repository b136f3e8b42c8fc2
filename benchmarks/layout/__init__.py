"""Measures what each layout costs."""
