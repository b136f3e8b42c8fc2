"""Any layout beside one plain process: the proof that they compute the same."""
