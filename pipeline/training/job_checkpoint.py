"""A job's checkpoints: what goes into one besides the engine's state, and going on from the newest."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from pipeline.training import checkpoint
from pipeline.training.job_settings import about, changes, settings
from pipeline.training.setup import Setup


def save(setup: Setup, step: int, values: Mapping[str, Any]) -> None:
    """Write the state after `step` steps. Collective.

    Args:
        values: the last step's metrics; the numbers among them go into the checkpoint, for a model card.

    Raises:
        CheckpointError: see `checkpoint.save`.
    """
    # A plan that is being made reads the table, which must not change meanwhile: wait for it.
    setup.plan.settle(setup.table)
    state: dict[str, Any] = {
        "fingerprint": _fingerprint(setup),
        "plan": setup.plan.state_dict(),
        "about": about(setup.recipe, setup.name, len(setup.samples)),
        "metrics": {name: value for name, value in values.items() if isinstance(value, float)},
    }
    probe_arrays, probe_state = setup.export_probe.record()
    state |= {**probe_state, **setup.incidents.state_dict()}
    arrays = setup.plan.arrays() | probe_arrays
    if setup.distillation:
        state |= setup.distillation.state_dict()
        arrays |= setup.distillation.table.arrays()
    root, keep = setup.dir / "checkpoints", setup.job.checkpoint.keep
    checkpoint.save(setup.engine, root, step, state, arrays, keep, setup.template)
    if dist.get_rank() == 0 and setup.distillation:
        setup.distillation.table.save(setup.dir / "hardness.parquet")


def resume(setup: Setup, *, change_settings: bool = False) -> int:
    """Go on from the job's newest checkpoint: the steps it has done, 0 without one. Collective.

    Args:
        change_settings: whether settings that can change from a checkpoint on may do so.

    Raises:
        CheckpointError: see `checkpoint.load`.
        UserError: the checkpoint was written with other settings.
    """
    loaded = checkpoint.load(setup.engine, setup.dir / "checkpoints")
    if loaded is None:
        return 0
    changed = changes(setup.dir, loaded.state["fingerprint"], _fingerprint(setup), allowed=change_settings)
    setup.incidents.load(loaded.state, loaded.step)
    setup.incidents.change(loaded.step, changed)
    setup.plan.load(loaded.state["plan"], loaded.arrays)
    if setup.distillation:
        setup.distillation.load(loaded.state, loaded.arrays)
    return loaded.step


def _fingerprint(setup: Setup) -> dict[str, Any]:
    return settings(setup.recipe, setup.name) | {"num_samples": len(setup.samples)}
