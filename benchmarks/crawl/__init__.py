"""The corpus pipeline on pages with planted noise: a demo that scores it, and a benchmark beside others."""
