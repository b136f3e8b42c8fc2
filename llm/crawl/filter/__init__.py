"""Which documents stay, by rules with published thresholds."""
