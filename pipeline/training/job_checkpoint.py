"""A job's checkpoints: what goes into one besides the engine's state, and going on from the newest."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from pipeline.training import checkpoint, data_change
from pipeline.training.data_change import DataChange
from pipeline.training.job_settings import about, changes, settings
from pipeline.training.setup import Setup


def save(setup: Setup, step: int, values: Mapping[str, Any]) -> None:
    """Write the state after `step` steps. Collective.

    Args:
        values: the last step's metrics; the numbers among them go into the checkpoint, for a model card.

    Raises:
        CheckpointError: see `checkpoint.save`, `TrainingData.keep_ids`.
    """
    # A plan that is being made reads the table, which must not change meanwhile: wait for it.
    setup.plan.settle(setup.table)
    setup.data.keep_ids(setup.dir)
    state: dict[str, Any] = {
        "fingerprint": settings(setup.recipe, setup.name),
        "samples": setup.data.state_dict(),
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
        change_settings: whether settings that can change from a checkpoint on, and samples, may do so.

    Raises:
        CheckpointError: see `checkpoint.load`, `data_change.change`.
        UserError: the checkpoint was written with other settings, or of other samples.
    """
    loaded = checkpoint.load(setup.engine, setup.dir / "checkpoints")
    if loaded is None:
        return 0
    state, held = loaded.state, setup.distillation.held_out if setup.distillation else ()
    moved = data_change.change(setup.dir, state.get("samples"), setup.data, setup.samples, held)
    others = moved.lines(setup.samples) if moved else []
    ours = settings(setup.recipe, setup.name)
    changed = changes(setup.dir, state["fingerprint"], ours, allowed=change_settings, others=others)
    setup.incidents.load(state, loaded.step)
    setup.incidents.change(loaded.step, changed + ([moved.record()] if moved else []))
    if setup.distillation:
        setup.distillation.load(state)
    if moved is None:
        setup.plan.load(state["plan"], loaded.arrays)
        if setup.table is not None:
            setup.table.load_arrays(loaded.arrays)
    else:
        _carry(setup, loaded, moved)
    return loaded.step


def _carry(setup: Setup, loaded: checkpoint.Loaded, moved: DataChange) -> None:
    """Go on with other samples: what is known of each that is still there, and no plan.

    The rest of the window is planned anew when it is asked for, by `WindowPlan.refresh`; so what the checkpoint had
    planned and not trained is taken back.
    """
    if setup.table is not None:
        untrained = setup.plan.untrained(loaded.step, loaded.state["plan"], loaded.arrays)
        setup.table.carry(loaded.arrays, moved.place_in_table(loaded.state.get("held_out", ())), untrained)
