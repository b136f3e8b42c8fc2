"""Checkpoints that belong to the model: any layout reads what any layout wrote."""
