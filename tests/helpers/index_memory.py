"""What an index costs a process that is handed one."""

import pickle
import tracemalloc
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipeline.data.index import samples as index_samples
from pipeline.data.index.samples import Index


def held_bytes(content: bytes, use: Callable[[Index], bool]) -> int:
    """Bytes that Python holds after the pickled index was opened, walked through, measured and used; Arrow holds none.

    Args:
        use: whether what it reads is right.
    """
    index_samples._table.cache_clear()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    index = pickle.loads(content)
    assert sum(1 for _ in index.sample_ids) == len(index)
    index.sizes(np.arange(len(index)))
    assert use(index)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert pa.total_allocated_bytes() == arrow
    return held
