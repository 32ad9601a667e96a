"""The training loop. One loop for teacher SFT, student SFT, vanilla KD and CLKD: the recipe alone differs.

    deepspeed train.py --config RECIPE.yaml --deepspeed_config ds_configs/X.json job=NAME

Exit codes: 0 done; 2 refused, nothing lost; 85 checkpointed after SIGTERM or SIGUSR1, start it again to go on.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline import checkpoint, curriculum, export, models, moe
from pipeline.batches import MicroBatch, MicroBatches, Request, iterate
from pipeline.command_line import parse_args
from pipeline.config import CurriculumConfig, JobConfig, Recipe
from pipeline.data import read_samples, require_answers
from pipeline.errors import ConfigError, UserError, run_main
from pipeline.fused_head import FusedHead
from pipeline.hardness import HardnessTable
from pipeline.losses import WeightNormaliser
from pipeline.metrics import MetricsLogger
from pipeline.plan import WindowPlan
from pipeline.processor import Processor
from pipeline.runtime import StopFlag, only_one, start_distributed
from pipeline.step import StepContext, StepStats, run_step
from pipeline.target_store import SoftTargetStore
from pipeline.teacher import dataset_fingerprint, expected_identity
from pipeline.vision import CellWords, VisionProbe

EXIT_REQUEUE = 85


@dataclass
class Distillation:
    """The teacher's side of a job: targets, hardness table, weight normaliser."""

    store: SoftTargetStore
    table: HardnessTable
    normaliser: WeightNormaliser


class Trainer:
    """One job on one rank: construction checks everything, `run` trains."""

    def __init__(self, recipe: Recipe, name: str, job: JobConfig, ds_json: dict[str, Any], stop: StopFlag) -> None:
        self.recipe, self.name, self.job, self.stop = recipe, name, job, stop
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.dir = recipe.job_dir(name)
        self.processor = Processor.load(recipe.processor_dir, recipe.data)
        self.samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
        require_answers(self.samples, f"{recipe.data_root}, split {recipe.data.train_split!r}")
        self.distillation = self._open_distillation()
        self.engine = self._engine(ds_json)
        model_config = self.engine.module.config
        moe.expect_converted(self.engine, model_config)
        has_experts = bool(moe.moe_layers(model_config))
        self.head = FusedHead(self.engine.module)
        self.probe = moe.RouterProbe(self.engine.module) if has_experts else None
        self.top_k = model_config.get_text_config().num_experts_per_tok if has_experts else 0
        self.vision = VisionProbe(self.engine.module) if job.vision_words > 0 else None
        self.cells = CellWords(self.processor) if job.vision_words > 0 else None
        self.step = 0
        window_steps = (job.curriculum or CurriculumConfig()).window_steps
        self.plan = WindowPlan(
            len(self.samples),
            job.global_batch_size,
            window_steps,
            recipe.run.seed,
            job.curriculum,
            job.hardness,
        )

    # -- set-up ------------------------------------------------------------------------------------------------

    def _open_distillation(self) -> Distillation | None:
        if self.job.distill is None and self.job.curriculum is None:
            return None
        store = SoftTargetStore.open(self.recipe.store_url, expected_identity(self.recipe, self.processor))
        ids = [s.sample_id for s in self.samples]
        store.require(ids, dataset_fingerprint(self.samples))
        table = HardnessTable.load(self.recipe.run.dir / "hardness.parquet")
        if list(table.sample_ids) != ids:
            raise UserError(
                f"{self.recipe.run.dir / 'hardness.parquet'}: made for {len(table.sample_ids)} other samples than the "
                f"{len(ids)} of this run. Make it again with `python -m pipeline.hardness`. Nothing was started."
            )
        return Distillation(store, table, WeightNormaliser())

    def _engine(self, ds_json: dict[str, Any]) -> Any:
        model = models.load_model(self.recipe.model_dir(self.job.init), attention=models.batch_attention())
        models.check_compatible(model, self.processor)
        config = moe.prepare_deepspeed_config(ds_json, self.job, model.config, self.world)
        if self.job.activation_checkpointing:
            moe.enable_activation_checkpointing(model)
        freeze(model, self.job.trainable)
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
        return engine

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end or until a signal; returns the exit status."""
        self._resume()
        progress = tqdm(total=self.job.steps, initial=self.step, desc=self.name, disable=self.rank != 0, mininterval=1)
        with self._logger() as logger, progress:
            for micro_batches, waited in self._steps():
                started = time.monotonic()
                stats, measured = self._optimize(micro_batches)
                self.step += 1
                values = measured | _per_token(stats, waited, waited + time.monotonic() - started)
                progress.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                progress.update()
                finished, stopped = self.step == self.job.steps, stats.sums["stop"] > 0
                if logger and (finished or stopped or self.step % self.job.log_every == 0):
                    logger.log(self.step, values)
                if finished or stopped or self.step % self.job.checkpoint_every == 0:
                    self._save()
                if stopped and not finished:
                    return EXIT_REQUEUE
        if self.rank == 0:
            export.write_model(self.recipe, self.name)
        dist.barrier()
        return 0

    def _logger(self) -> contextlib.AbstractContextManager[MetricsLogger | None]:
        return MetricsLogger(self.dir, resume_step=self.step) if self.rank == 0 else contextlib.nullcontext()

    def _steps(self) -> Iterator[tuple[list[MicroBatch], float]]:
        """Micro-batches of each step and the seconds waited for them; read ahead within a window."""
        store = self.distillation.store if self.distillation and self.job.distill else None
        while self.step < self.job.steps:
            self.plan.refresh(self.step, self._tau(self.step), self.distillation.table if self.distillation else None)
            steps = range(self.step, min(self.plan.end, self.job.steps))
            requests = [self._requests(step) for step in steps]
            flat = [request for step_requests in requests for request in step_requests]
            stream = iterate(MicroBatches(self.samples, self.processor, store, flat, self.cells), self.recipe.data)
            for step_requests in requests:
                started = time.monotonic()
                yield [next(stream) for _ in step_requests], time.monotonic() - started

    def _requests(self, step: int) -> list[Request]:
        """This rank's micro-batches of a step: table indices and alpha of each sample."""
        index_G, percentile_G = self.plan.batch(step)
        distill = self.job.distill
        alpha_G = (
            curriculum.release_alpha(self._tau(step), percentile_G, distill) if distill else 0 * percentile_G
        ).astype("float32")
        positions = curriculum.rank_share(self.job.global_batch_size, self.rank, self.world, self.job.micro_batch_size)
        return [Request(index_G[p], alpha_G[p]) for p in positions]

    def _tau(self, step: int) -> float:
        """Share of training done, in samples."""
        return step / self.job.steps

    def _optimize(self, micro_batches: list[MicroBatch]) -> tuple[StepStats, dict[str, Any]]:
        """One optimizer step, refused before it happens when the loss is not finite on any rank."""
        lr = learning_rate(self.job, self.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        settings = self.job.curriculum or CurriculumConfig()
        competence = curriculum.competence(self._tau(self.step), settings.competence_start, settings.competence_until)
        tilt = self.job.distill.token_tilt if self.job.distill else 0.0
        beta = curriculum.tilt(competence, settings.competence_start, tilt)
        normaliser = self.distillation.normaliser.value if self.distillation else 1.0
        context = StepContext(
            engine=self.engine,
            head=self.head,
            probe=self.probe,
            top_k=self.top_k,
            vision=self.vision,
            job=self.job,
            temperature=self.recipe.targets.temperature,
            beta=beta,
            normaliser=normaliser,
        )
        stats = run_step(context, micro_batches, stop=self.stop.raised)
        self._refuse_not_finite("loss", stats.sums["loss"], micro_batches)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        grad_norm = float(norm) if norm is not None else 0.0
        self._refuse_not_finite("gradient norm", grad_norm, micro_batches)
        self._learn_hardness(stats)
        return stats, {
            "samples": (self.step + 1) * self.job.global_batch_size,
            "lr": lr,
            "grad_norm": grad_norm,
            "competence": competence if self.job.curriculum else 1.0,
            "beta": beta,
            "normaliser": normaliser,
        }

    def _refuse_not_finite(self, what: str, value: float, micro_batches: Sequence[MicroBatch]) -> None:
        if math.isfinite(value):
            return
        saved = checkpoint.latest(self.dir / "checkpoints")
        raise UserError(
            f"job {self.name!r}, step {self.step + 1}: the {what} is {value}. This rank's samples: "
            f"{[i for m in micro_batches for i in m.sample_ids]}. Nothing of this step was saved; the last checkpoint "
            f"is {saved.name if saved else 'none'}. Lower jobs.{self.name}.lr (now {self.job.lr}) or inspect these."
        )

    def _learn_hardness(self, stats: StepStats) -> None:
        if self.distillation is None or self.job.distill is None:
            return
        self.distillation.normaliser.update(stats.sums["weight"], stats.sums["weight_count"])
        if self.job.hardness.dynamic:
            index, scores = stats.gather_scores()
            self.distillation.table.update(index, scores, self.step, self.job.hardness.ema)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state: dict[str, Any] = {"fingerprint": self._fingerprint(), "plan": self.plan.state_dict()}
        arrays = self.plan.arrays()
        if self.distillation:
            state["normaliser"] = self.distillation.normaliser.state_dict()
            arrays |= self.distillation.table.arrays()
        root, keep = self.dir / "checkpoints", self.job.keep_checkpoints
        checkpoint.save(self.engine, root, self.step, state, arrays, keep)
        if self.rank == 0 and self.distillation:
            self.distillation.table.save(self.dir / "hardness.parquet")

    def _resume(self) -> None:
        loaded = checkpoint.load(self.engine, self.dir / "checkpoints")
        if loaded is None:
            return
        refuse_other_settings(self.dir, loaded.state["fingerprint"], self._fingerprint())
        self.step = loaded.step
        self.plan.load(loaded.state["plan"], loaded.arrays)
        if self.distillation:
            self.distillation.normaliser.load_state_dict(loaded.state["normaliser"])
            self.distillation.table.load_arrays(loaded.arrays)

    def _fingerprint(self) -> dict[str, Any]:
        return settings(self.job, self.recipe.run.seed) | {"num_samples": len(self.samples)}


def settings(job: JobConfig, seed: int) -> dict[str, Any]:
    """Settings that define the training's result; how it is spread over ranks is left out on purpose."""
    free = {"micro_batch_size", "checkpoint_every", "keep_checkpoints", "log_every", "activation_checkpointing"}
    values: dict[str, Any] = json.loads(job.model_dump_json(exclude=free))
    return values | {"seed": seed}


def refuse_other_settings(job_dir: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """UserError with both values of every setting in which a job's checkpoint and the recipe differ."""
    differs = [f"{k}: checkpoint {saved.get(k)!r}, recipe {v!r}" for k, v in ours.items() if saved.get(k) != v]
    if differs:
        raise UserError(
            f"{job_dir}: this job was started with other settings.\n  " + "\n  ".join(differs) + "\n"
            "Restore them, or train under another job name. Nothing was changed."
        )


def finished(recipe: Recipe, name: str, job: JobConfig) -> bool:
    """Whether the job's final model is written: it was exported after the last step."""
    report = recipe.model_dir(f"jobs.{name}") / export.REPORT
    return report.is_file() and int(json.loads(report.read_text())["step"]) == job.steps


def freeze(model: PreTrainedModel, trainable: str) -> None:
    """Leave gradients on for `all`, for the decoder (`language`), or for its MLPs and routers only."""
    for name, parameter in model.named_parameters():
        in_decoder = ".visual." not in name
        parameter.requires_grad_(trainable == "all" or (in_decoder and (trainable == "language" or ".mlp." in name)))


def learning_rate(job: JobConfig, step: int) -> float:
    """Linear warm-up, then a cosine from the peak to `min_lr_share` of it; a function of the share of training done."""
    tau = (step + 1) / job.steps
    if tau <= job.warmup_share:
        return job.lr * tau / job.warmup_share
    decay = (tau - job.warmup_share) / max(1.0 - job.warmup_share, 1e-9)
    return job.lr * (job.min_lr_share + (1 - job.min_lr_share) * 0.5 * (1 + math.cos(math.pi * decay)))


def _per_token(stats: StepStats, waited: float, seconds: float) -> dict[str, Any]:
    """Means over the global batch of what the step summed."""
    sums = stats.sums
    tokens, distilled, scored = (max(sums[k], 1.0) for k in ("tokens", "distilled", "scored"))
    values: dict[str, Any] = {
        "loss": sums["loss"] / tokens,
        "ce": sums["ce"] / tokens,
        "kl": sums["kl"] / distilled,
        "alpha": sums["alpha"] / tokens,
        "token_hardness": sums["token_hardness"] / distilled,
        "instance_hardness": sums["instance_hardness"] / scored,
        "tokens_per_s": sums["positions"] / seconds,
        "data_wait_s": waited,
        "step_s": seconds,
    }
    if "vision" in sums:
        values["vision"] = sums["vision"] / sums["samples"]
    if stats.router_load_LE is not None:
        load = stats.router_load_LE / stats.router_load_LE.sum(-1, keepdim=True)
        values |= {
            "expert_load": load.tolist(),
            "router_entropy": [sums[f"router_entropy/{layer}"] for layer in range(len(load))],
            "balance": sums["balance"] / len(load),
            "z": sums["z"] / len(load),
        }
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}. Nothing was started.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(content).__name__}. Nothing was started.")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the training stage."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    args = parse_args("train", argv, parser)
    recipe, (name, job) = args.recipe, args.recipe.selected_job()
    path: Path = args.options.deepspeed_config
    if not path.is_file():
        raise ConfigError(f"{path}: no such DeepSpeed config; see ds_configs/. Nothing was started.")
    ds_json = _read_json(path)
    if finished(recipe, name, job):
        saved = checkpoint.latest(recipe.job_dir(name) / "checkpoints")
        if saved is not None:
            fingerprint = checkpoint.read_meta(saved)["state"]["fingerprint"]
            refuse_other_settings(recipe.job_dir(name), fingerprint, settings(job, recipe.run.seed))
        print(f"job {name!r} is finished: {recipe.model_dir(f'jobs.{name}')}")
        return 0
    stop = StopFlag()
    torch.set_float32_matmul_precision(recipe.run.matmul_precision)
    start_distributed()
    torch.manual_seed(recipe.run.seed)
    with only_one(recipe.job_dir(name), dist.get_rank()):
        return Trainer(recipe, name, job, ds_json, stop).run()


if __name__ == "__main__":
    run_main(main)
