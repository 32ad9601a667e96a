import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.training.step import StepStats
from tests.helpers import ranks

COUNTS = (3, 0, 5, 1)
"""Samples that each rank distilled, of at most 5."""


def scored(rank):
    """(index, score) of a rank's micro-batches: two of them, indices beyond what float32 can hold."""
    rng = np.random.default_rng(rank)
    index = rng.choice(2**40, COUNTS[rank]) if COUNTS[rank] else np.zeros(0, np.int64)
    return torch.from_numpy(index), torch.from_numpy(rng.random(COUNTS[rank]).astype(np.float32))


def gather(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stats, (index, scores) = StepStats(), scored(rank)
    if rank != 1:
        stats.index, stats.scores = list(index.split(2)), list(scores.split(2))
    got = stats.gather_scores(5, torch.device("cpu"))
    np.savez(folder / f"{rank}.npz", index=got[0], scores=got[1])
    dist.destroy_process_group()


@pytest.mark.slow
def test_scores_of_uneven_ranks_arrive_exactly_and_on_every_rank(tmp_path):
    """One rank has none at all."""
    ranks.run(gather, tmp_path, ranks=len(COUNTS))
    index, scores = (torch.cat(parts).numpy() for parts in zip(*map(scored, range(len(COUNTS))), strict=True))
    order = np.argsort(index)
    assert len(order) == sum(COUNTS)
    for rank in range(len(COUNTS)):
        got = np.load(tmp_path / f"{rank}.npz")
        assert np.array_equal(got["index"], index[order]) and got["index"].dtype == np.int64
        assert np.array_equal(got["scores"], scores[order]) and got["scores"].dtype == np.float32
