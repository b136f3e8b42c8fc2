"""From text to token files, and what is done to such files."""
