"""The training loop. One loop for teacher SFT, student SFT, vanilla KD and CLKD: the recipe alone differs.

    deepspeed train.py --config RECIPE.yaml --deepspeed_config ds_configs/X.json job=NAME

Exit codes: 0 done; 2 refused, nothing lost; 75 lost contact with another rank, 85 checkpointed after SIGTERM or
SIGUSR1: start it again to go on.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from pipeline.benchmark.word_alignment import CellWords, VisionProbe
from pipeline.data.processor import Processor
from pipeline.data.splits import open_training_split
from pipeline.errors import UserError
from pipeline.export import stage as export
from pipeline.files import differences, listed
from pipeline.method import curriculum, features
from pipeline.method.fused_head import FusedHead
from pipeline.method.plan import WindowPlan
from pipeline.method.release import ClosingGap
from pipeline.method.schedules import Schedules
from pipeline.models import checkpoint_folder, compatibility, loading, moe
from pipeline.models.families import moe_layers
from pipeline.recipe import CurriculumConfig, JobConfig, Recipe
from pipeline.training import checkpoint, engine
from pipeline.training.batches import MicroBatch, MicroBatches, Request, by_length, iterate
from pipeline.training.distillation import Distillation
from pipeline.training.metrics import MetricsLogger
from pipeline.training.process import StopFlag, from_first_rank
from pipeline.training.step import StepContext, StepStats, run_step
from pipeline.training.step_metrics import per_token

EXIT_REQUEUE = 85


class Trainer:
    """One job on one rank: construction checks everything, `run` trains."""

    def __init__(self, recipe: Recipe, name: str, job: JobConfig, ds_json: dict[str, Any], stop: StopFlag) -> None:
        self.recipe, self.name, self.job, self.stop = recipe, name, job, stop
        self.schedules = Schedules(job)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.dir = recipe.job_dir(name)
        self.processor = Processor.load(recipe.processor_dir, recipe.data)
        samples = from_first_rank(lambda: open_training_split(recipe))
        self.distillation = Distillation.open(recipe, job, self.processor, samples)
        self.samples = self.distillation.samples if self.distillation else samples
        self.engine = self._engine(ds_json)
        model_config = self.engine.module.config
        has_experts = bool(moe_layers(model_config))
        self.head = FusedHead(self.engine.module)
        self.probe = moe.RouterProbe(self.engine.module) if has_experts else None
        self.top_k = model_config.get_text_config().num_experts_per_tok if has_experts else 0
        self.vision = VisionProbe(self.engine.module) if job.vision_words > 0 else None
        self.cells = CellWords(self.processor) if job.vision_words > 0 else None
        self.step, self.values = 0, dict[str, Any]()
        self.template = (
            export.template_files(recipe.model_dir(job.init), recipe.processor_dir) if self.rank == 0 else None
        )
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

    def _engine(self, ds_json: dict[str, Any]) -> Any:
        folder = self.recipe.model_dir(self.job.init)
        model = loading.load_model(folder, attention=loading.batch_attention())
        compatibility.check_compatible(model, self.processor)
        compatibility.check_own_files(folder, self.processor, self.recipe.data)
        if self.job.activation_checkpointing:
            moe.enable_activation_checkpointing(model)
        loading.freeze(model, self.job.trainable)
        wanted = self.job.distill.active_features if self.job.distill else None
        if wanted is not None and self.distillation is not None and self.distillation.sketches is not None:
            features.HiddenStates(model, wanted.student_layer, f"jobs.{self.name}.{features.SETTING}", "student")
            dim = int(self.distillation.sketches.identity["sketch_dim"])
            features.attach_map(model, dim, self.recipe.run.seed)
        model.train()
        return engine.start(model, self.job, ds_json)

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
                values = self.values = measured | per_token(stats, waited, waited + time.monotonic() - started)
                progress.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                progress.update()
                finished, stopped = self.step == self.job.steps, stats.sums["stop"] > 0
                if logger and (finished or stopped or self.step % self.job.log_every == 0):
                    logger.log(self.step, values)
                if finished or stopped or self.step % self.job.checkpoint_every == 0:
                    self._save()
                if stopped and not finished:
                    return EXIT_REQUEUE
        if self.rank == 0 and _exported(self.job):
            export.write_model(self.recipe, self.name)
        dist.barrier()
        return 0

    def _logger(self) -> contextlib.AbstractContextManager[MetricsLogger | None]:
        return MetricsLogger(self.dir, resume_step=self.step) if self.rank == 0 else contextlib.nullcontext()

    def _steps(self) -> Iterator[tuple[list[MicroBatch], float]]:
        """Micro-batches of each step and the seconds waited for them; read ahead until the plan or alpha can change."""
        store = self.distillation.store if self.distillation and self.job.distill else None
        table = self.distillation.table if self.distillation else None
        while self.step < self.job.steps:
            tau = self.schedules.tau(self.step)
            self.plan.settle(table)
            self.plan.refresh(self.step, tau, table)
            self._measure_gap()
            measured = next((step for step in self.schedules.gap_steps() if step > self.step), self.job.steps)
            steps = range(self.step, min(self.plan.end, measured, self.job.steps))
            requests = [self._requests(step) for step in steps]
            flat = [request for step_requests in requests for request in step_requests]
            sketches = self.distillation.sketches if self.distillation else None
            dataset = MicroBatches(self.samples, self.processor, store, flat, self.cells, sketches)
            stream = iterate(dataset, self.recipe.data)
            for step, step_requests in zip(steps, requests, strict=True):
                started = time.monotonic()
                micro_batches = [next(stream) for _ in step_requests]
                if self.plan.end < self.job.steps:  # after `next`, so that no worker is forked while a thread plans
                    self.plan.look_ahead(step, self.schedules.tau(self.plan.end), table)
                yield micro_batches, time.monotonic() - started

    def _requests(self, step: int) -> list[Request]:
        """This rank's micro-batches of a step: table indices and alpha of each sample."""
        index_G, percentile_G = self.plan.batch(step)
        alpha_G = self.schedules.alpha(step, percentile_G, self._gap)
        order_G = by_length(self.samples, index_G)
        positions = curriculum.rank_share(self.job.global_batch_size, self.rank, self.world, self.job.micro_batch_size)
        feature_G = self.schedules.feature_alpha(step, percentile_G, self._gap)
        places = [order_G[p] for p in positions]
        if feature_G is None:
            return [Request(index_G[p], alpha_G[p]) for p in places]
        return [Request(index_G[p], alpha_G[p], feature_G[p]) for p in places]

    @property
    def _gap(self) -> ClosingGap | None:
        return self.distillation.gap if self.distillation else None

    def _measure_gap(self) -> None:
        """Measure the gap where it is due, once, and as long as it holds the teacher."""
        distillation, tau = self.distillation, self.schedules.tau(self.step)
        if distillation is None or distillation.probe is None or self.step not in self.schedules.gap_steps():
            return
        if distillation.gap.last_tau < tau and distillation.gap.left > 0:
            distillation.gap.add(tau, distillation.probe.measure(self.engine, self.head))

    def _optimize(self, micro_batches: list[MicroBatch]) -> tuple[StepStats, dict[str, Any]]:
        """One optimizer step, refused before it happens when the loss is not finite on any rank."""
        lr = learning_rate(self.job, self.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        beta = self.schedules.token_beta(self.step)
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
            feature_beta=self.schedules.feature_beta(self.step),
            feature_normaliser=self.distillation.feature_normaliser.value if self.distillation else 1.0,
        )
        stats = run_step(context, micro_batches, stop=self.stop.raised)
        self._refuse_not_finite("loss", stats.sums["loss"], micro_batches)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        grad_norm = float(norm) if norm is not None else 0.0
        self._refuse_not_finite("gradient norm", grad_norm, micro_batches)
        if self.distillation:
            most = -(-self.job.global_batch_size // self.world)
            self.distillation.learn(stats, self.step, self.job, most, self.engine.device)
        return stats, {
            "samples": (self.step + 1) * self.job.global_batch_size,
            "lr": lr,
            "grad_norm": grad_norm,
            "competence": self.schedules.competence(self.step) if self.job.curriculum else 1.0,
            "sample_beta": self.schedules.sample_beta(self.step),
            "token_beta": beta,
            "normaliser": normaliser,
            **({"feature_beta": context.feature_beta} if context.features else {}),
        } | self._release_metrics()

    def _release_metrics(self) -> dict[str, float]:
        """Range of alpha over the global batch; what an adaptive release follows."""
        alpha_G = self.schedules.alpha(self.step, self.plan.batch(self.step)[1], self._gap)
        values = {"alpha_min": float(alpha_G.min()), "alpha_max": float(alpha_G.max())}
        if self._gap is not None and self._gap.gap is not None:
            values |= {"gap": self._gap.gap, "gap_left": self._gap.left}
        return values

    def _refuse_not_finite(self, what: str, value: float, micro_batches: Sequence[MicroBatch]) -> None:
        if math.isfinite(value):
            return
        saved = checkpoint_folder.latest(self.dir / "checkpoints")
        raise UserError(
            f"job {self.name!r}, step {self.step + 1}: the {what} is {value}. This rank's samples: "
            f"{[i for m in micro_batches for i in m.sample_ids]}. Nothing of this step was saved; the last checkpoint "
            f"is {saved.name if saved else 'none'}. Lower jobs.{self.name}.lr (now {self.job.lr}) or inspect these."
        )

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.plan.settle(self.distillation.table if self.distillation else None)
        state: dict[str, Any] = {
            "fingerprint": self._fingerprint(),
            "plan": self.plan.state_dict(),
            "about": about(self.recipe, self.name, len(self.samples)),
            "metrics": {name: value for name, value in self.values.items() if isinstance(value, float)},
        }
        arrays = self.plan.arrays()
        if self.distillation:
            state |= self.distillation.state_dict()
            arrays |= self.distillation.table.arrays()
        root, keep = self.dir / "checkpoints", self.job.keep_checkpoints
        checkpoint.save(self.engine, root, self.step, state, arrays, keep, self.template)
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
            self.distillation.load(loaded.state, loaded.arrays)

    def _fingerprint(self) -> dict[str, Any]:
        return settings(self.job, self.recipe.run.seed) | {"num_samples": len(self.samples)}


def settings(job: JobConfig, seed: int) -> dict[str, Any]:
    """Settings that define the training's result; how it is spread over ranks is left out on purpose.

    So is the kind of MoE layer, unless it drops tokens or has a residual expert: else both compute the same.
    """
    free = {"micro_batch_size", "checkpoint_every", "keep_checkpoints", "log_every", "activation_checkpointing"}
    values: dict[str, Any] = json.loads(job.model_dump_json(exclude=free | {"moe_layer", "native_moe"}))
    native = job.native_moe
    return values | {
        "seed": seed,
        "native_moe": native.model_dump() if native.drop_tokens or native.use_residual else None,
    }


def about(recipe: Recipe, name: str, num_samples: int) -> dict[str, Any]:
    """What a model card says of a job besides its settings. Names only: paths mean nothing elsewhere."""
    data, teacher = recipe.data, recipe.targets.teacher
    return {
        "job": name,
        "teacher": f"{teacher} ({recipe.model_dir(teacher).name})" if recipe.jobs[name].distill else None,
        "data": {
            "data": f"{recipe.data_root.name}, split {data.train_split}, {num_samples:,} samples",
            "images": f"{data.min_pixels:,} to {data.max_pixels:,} pixels",
        },
    }


def refuse_other_settings(job_dir: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """UserError with both values of every setting in which a job's checkpoint and the recipe differ."""
    if differs := differences(saved, ours, ("checkpoint", "recipe")):
        raise UserError(
            f"{job_dir}: this job was started with other settings.{listed(differs)}\n"
            "Restore them, or train under another job name. Nothing was changed."
        )


def _exported(job: JobConfig) -> bool:
    """False, and said, for the one kind of model that no Hugging Face architecture holds."""
    if job.native_moe.use_residual:
        print(
            "native_moe.use_residual: Hugging Face's layout has no place for the residual MLP and its coefficient, so "
            "no model is exported and nothing can be evaluated. The checkpoint is complete and training can go on."
        )
    return not job.native_moe.use_residual


def learning_rate(job: JobConfig, step: int) -> float:
    """Linear warm-up, then a cosine from the peak to `min_lr_share` of it; a function of the share of training done."""
    tau = (step + 1) / job.steps
    if tau <= job.warmup_share:
        return job.lr * tau / job.warmup_share
    decay = (tau - job.warmup_share) / max(1.0 - job.warmup_share, 1e-9)
    return job.lr * (job.min_lr_share + (1 - job.min_lr_share) * 0.5 * (1 + math.cos(math.pi * decay)))
