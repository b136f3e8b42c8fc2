"""Benchmarks of Ingot's loader beside others, on the same tokens.

cases.py lists what is measured. runner.py asks one process per loader (server.py) for one measurement after another, in
turns, and measure.py makes each in a fork of that process. ours.py is the only module that knows Ingot's loader. Every
other loader has a module of its own, which is imported only in that loader's process: none has to be installed.
"""
