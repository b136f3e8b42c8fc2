"""Captures a profile of a run's steps: where each rank's time and memory went, as a typed record and a timeline."""
