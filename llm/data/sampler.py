"""What one data-parallel rank computes in a step: csrc/core/sampler.cpp in NumPy, its oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm.data.documents import scan_documents
from llm.data.packing import PackPlan, lay_out_pieces
from llm.data.schedule import Schedule
from llm.data.shards import DamagedFile, NumpyCorpus, ShardList

TRIES = 1000  # samples tried for one that cannot be read
