"""What each step reads: the planned samples as this rank's micro-batches, built ahead of their use.

Shapes: G samples of a global batch.
"""

import time
from collections.abc import Iterator

import torch.distributed as dist

from pipeline.method import curriculum
from pipeline.training.batches import MicroBatch, MicroBatches, Request, by_length, iterate
from pipeline.training.setup import Setup


def steps(setup: Setup, step: int) -> Iterator[tuple[list[MicroBatch], float]]:
    """This rank's micro-batches of each step, from `step` on, and the seconds waited for them. Collective.

    Ask for the next ones only after the step is trained: the plan and an adaptive release look at its outcome.
    """
    job, plan, schedules, table = setup.job, setup.plan, setup.schedules, setup.table
    while step < job.steps:
        plan.settle(table)
        plan.refresh(step, schedules.tau(step), table)
        _measure_gap(setup, step)
        # Nothing is read beyond the step where the plan, or an adaptive release's alpha, can change.
        next_gap = next((due for due in schedules.gap_steps() if due > step), job.steps)
        requests = [_requests(setup, ahead) for ahead in range(step, min(plan.end, next_gap, job.steps))]
        stream = _stream(setup, requests)
        for step_requests in requests:
            started = time.monotonic()
            micro_batches = [next(stream) for _ in step_requests]
            if plan.end < job.steps:  # after `next`, so that no worker is forked while a thread plans
                plan.look_ahead(step, schedules.tau(plan.end), table)
            yield micro_batches, time.monotonic() - started
            step += 1


def _stream(setup: Setup, requests: list[list[Request]]) -> Iterator[MicroBatch]:
    """The micro-batches of several steps, built by worker processes in this order."""
    distillation = setup.distillation
    # A job may have a curriculum alone: then it has a table, but no soft targets to read.
    store = distillation.store if distillation and setup.job.distill else None
    sketches = distillation.sketches if distillation else None
    flat = [request for step_requests in requests for request in step_requests]
    dataset = MicroBatches(setup.samples, setup.processor, store, flat, setup.cells, sketches)
    return iterate(dataset, setup.recipe.data)


def _requests(setup: Setup, step: int) -> list[Request]:
    """This rank's micro-batches of a step: table indices and alpha of each sample."""
    job, schedules = setup.job, setup.schedules
    index_G, percentile_G = setup.plan.batch(step)
    pool_G = setup.from_pool(index_G)
    alpha_G = schedules.alpha(step, percentile_G, pool_G, setup.gap)
    feature_G = schedules.feature_alpha(step, percentile_G, pool_G, setup.gap)
    order_G = by_length(setup.samples, index_G)
    ranks = dist.get_rank(), dist.get_world_size()
    positions = curriculum.rank_share(job.batch.global_size, *ranks, job.batch.micro_size)
    places = [order_G[p] for p in positions]
    if feature_G is None:
        return [Request(index_G[p], alpha_G[p]) for p in places]
    return [Request(index_G[p], alpha_G[p], feature_G[p]) for p in places]


def _measure_gap(setup: Setup, step: int) -> None:
    """Measure the gap that an adaptive release follows, if it is due before this step."""
    distillation, tau = setup.distillation, setup.schedules.tau(step)
    if distillation is None or distillation.probe is None or step not in setup.schedules.gap_steps():
        return
    # A resumed job may have this measurement already; and once the gap is closed, nothing depends on the next.
    if distillation.gap.last_tau < tau and distillation.gap.left > 0:
        distillation.gap.add(tau, distillation.probe.measure(setup.engine, setup.head))
