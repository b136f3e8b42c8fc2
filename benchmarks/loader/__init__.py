"""Ingot's loader beside those of others, on the same tokens: what benchmarks.loader runs.

cases.py says what is measured; runner.py asks a process per loader (server.py) for one measurement after another, in
turns; measure.py makes it in a fork of that process. Only ours.py knows Ingot's loader, and each other loader has a
module of its own, imported where that loader runs alone: none of them has to be installed.
"""
