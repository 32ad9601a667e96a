"""What befell a job besides training: steps that were dropped, and settings or samples that changed on the way."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from tqdm import tqdm

from pipeline.data.problems import LEFT_OUT, append_left_out
from pipeline.errors import UserError
from pipeline.training.metrics import drop_after

FILE = "bad_steps.jsonl"
"""In the job's folder: a line for every dropped step."""


class Incidents:
    """Part of the job's state; every rank has the same."""

    def __init__(self, job_dir: Path, name: str, max_bad_steps: int) -> None:
        self.job_dir, self.name, self.max_bad_steps = job_dir, name, max_bad_steps
        self.bad_steps = 0
        """Steps dropped since the job's first start."""
        self.left_out: set[str] = set()
        """Samples that could not be encoded, since the job's first start."""
        self.changes: list[dict[str, Any]] = []
        """Of every changed setting: `step` (done before), `setting`, `before`, `after`.

        Of changed samples too, as the setting `samples`, with `added` and `removed`.
        """

    def drop(self, step: int, what: str, value: float, suspects: Sequence[str]) -> None:
        """Count a dropped step and write it down. Collective.

        Args:
            step: steps done before it.
            what: `loss` or `gradient norm`.
            value: of that, not finite.
            suspects: sample_ids of this rank that may be the cause.
        """
        self.bad_steps += 1
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, list(suspects))
        if dist.get_rank() == 0:
            ids = [sample_id for ids in gathered for sample_id in ids]
            line = {"step": step + 1, "what": what, "value": str(value), "samples": ids}
            self.job_dir.mkdir(parents=True, exist_ok=True)
            with (self.job_dir / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(
                f"job {self.name!r}, step {step + 1}: the {what} is {value}, so the step changes nothing "
                f"({self.bad_steps} such so far, at most {self.max_bad_steps}). Samples: {_some(ids)}"
            )

    def leave_out(self, step: int, left_out: Mapping[str, str]) -> None:
        """Write down samples that could not be encoded; each is said once. Collective.

        Args:
            step: steps done before the one that they belong to.
            left_out: why, by sample_id, of this rank's.
        """
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, dict(left_out))
        found = {sample_id: problem for some in gathered for sample_id, problem in some.items()}
        new = {sample_id: found[sample_id] for sample_id in sorted(found.keys() - self.left_out)}
        self.left_out |= new.keys()
        if dist.get_rank() == 0 and new:
            append_left_out(self.job_dir / LEFT_OUT, new, {"step": step + 1})
            tqdm.write(
                f"job {self.name!r}, step {step + 1}: {len(new)} bad sample(s) left out ({len(self.left_out)} so far, "
                f"see {self.job_dir / LEFT_OUT}). {next(iter(new.values()))}"
            )

    @property
    def too_many(self) -> bool:
        """Whether more steps were dropped than the job allows."""
        return self.bad_steps > self.max_bad_steps

    def refuse(self, step: int) -> NoReturn:
        """UserError about too many dropped steps. To be called with the state of `step` saved."""
        setting = f"jobs.{self.name}.optimizer"
        latest = self.job_dir / "checkpoints" / "latest"
        raise UserError(
            f"job {self.name!r}: {self.bad_steps} of {step} steps had a loss or a gradient that is not finite, more "
            f"than {setting}.max_bad_steps allows ({self.max_bad_steps}). They changed nothing. The checkpoint of step "
            f"{step} is written, and the same command goes on from it with the next batch. "
            f"{self.job_dir / FILE} lists steps and samples.\n"
            "  every step since one of them: the weights went astray before it. Write the name of an older checkpoint "
            f"into {latest}, lower {setting}.lr or {setting}.grad_clip, and start with --change-settings\n"
            "  the same few samples: look at them, mend or remove them\n"
            f"  here and there: raise {setting}.max_bad_steps"
        )

    def change(self, step: int, changes: Sequence[Mapping[str, Any]]) -> None:
        """Take note of settings, or samples, that are others from `step` on."""
        self.changes += [{"step": step, **change} for change in changes]
        if dist.get_rank() == 0:
            for change in changes:
                counts = f" ({change['added']:,} added, {change['removed']:,} removed)" if "added" in change else ""
                print(
                    f"job {self.name!r}, from step {step + 1} on: {change['setting']} {change['before']!r} -> "
                    f"{change['after']!r}{counts}"
                )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint's JSON."""
        return {"bad_steps": self.bad_steps, "changes": self.changes, "left_out": sorted(self.left_out)}

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """Restore from the checkpoint of `step`; what was written down after it is forgotten."""
        self.bad_steps, self.changes = state["bad_steps"], list(state["changes"])
        self.left_out = set(state["left_out"])
        if dist.get_rank() == 0:
            drop_after(self.job_dir / FILE, step)
            drop_after(self.job_dir / LEFT_OUT, step)


def _some(ids: Sequence[str], most: int = 8) -> str:
    more = f" and {len(ids) - most} more, in {FILE}" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more
