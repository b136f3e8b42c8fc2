"""A CPU emulator of Gluon kernels for sm_90: it runs a kernel's own source and finds wrong synchronisation.

It has registers, shared and global memory, mbarriers, TMA, asynchronous products and partitions. What may happen at
different moments happens at one that is bad for the kernel, drawn from a seed.

It has no layouts, bank conflicts or limits of registers, no single warps within a partition, and nothing that ptxas
reorders. Of the memory model it has clocks, and the fence between generic stores and asynchronous reads. So kernels are
compiled as well, and their machine code is checked.
"""

from .report import Event, Finding, Report
from .run import load, run

__all__ = ["Event", "Finding", "Report", "load", "run"]
