"""The training loop. One loop for teacher SFT, student SFT, vanilla KD and CLKD: the recipe alone differs."""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from pipeline.errors import EXIT_CHECKPOINTED
from pipeline.export import stage as export
from pipeline.training import feed, gradients, job_checkpoint
from pipeline.training.batches import MicroBatch
from pipeline.training.metrics import MetricsLogger
from pipeline.training.process import StopFlag, from_first_rank
from pipeline.training.setup import Setup
from pipeline.training.step import StepContext, StepStats, run_step
from pipeline.training.step_metrics import per_token, scheduled


def train(setup: Setup, stop: StopFlag, *, change_settings: bool = False) -> int:
    """Train from the newest checkpoint to the end, or until a signal. Collective.

    Args:
        change_settings: whether settings that can change from a checkpoint on may do so.

    Returns:
        The exit status: 0 finished and exported, 85 checkpointed after a signal.

    Raises:
        UserError: more steps than allowed had a loss or gradient that is not finite; the state is saved.
    """
    job, rank = setup.job, dist.get_rank()
    step = job_checkpoint.resume(setup, change_settings=change_settings)
    progress = tqdm(total=job.steps, initial=step, desc=setup.name, disable=rank != 0, mininterval=1)
    values: dict[str, Any] = {}
    next_save = (step // job.checkpoint.every + 1) * job.checkpoint.every
    with _logger(setup, step) as logger, progress:
        for micro_batches, waited in feed.steps(setup, step):
            started = time.monotonic()
            stats, measured = optimize(setup, step, micro_batches, stop=stop.raised)
            step += 1
            progress.update()
            # The sum over ranks, not this rank's own flag: all ranks stop after the same step.
            finished, stopped = step == job.steps, stats.sums["stop"] > 0
            if measured is not None:
                values = measured | per_token(stats, waited, waited + time.monotonic() - started)
                progress.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                if logger and (finished or stopped or step % job.log_every == 0):
                    logger.log(step, values)
            # Not after a dropped step: weights that went astray would push the sound checkpoints out, one by one.
            due = step >= next_save and measured is not None
            too_many = setup.incidents.too_many and measured is None
            if finished or stopped or too_many or due:
                job_checkpoint.save(setup, step, values)
                next_save = (step // job.checkpoint.every + 1) * job.checkpoint.every
            if too_many:
                setup.incidents.refuse(step)
            if stopped and not finished:
                return EXIT_CHECKPOINTED
    # The others wait, and end as the first rank does.
    from_first_rank(lambda: _export(setup))
    return 0


def optimize(
    setup: Setup, step: int, micro_batches: Sequence[MicroBatch], *, stop: bool
) -> tuple[StepStats, dict[str, Any] | None]:
    """One optimizer step, which changes nothing when the loss or the gradients are not finite. Collective.

    Args:
        step: steps done before this one.
        stop: whether this rank got a signal; becomes the sum `stop` over all ranks.

    Returns:
        Sums over the global batch, and what the step used: learning rate, schedules, gradient norm. None: it changed
        nothing.
    """
    job, distillation = setup.job, setup.distillation
    lr = setup.schedules.learning_rate(step)
    for group in setup.engine.optimizer.param_groups:
        group["lr"] = lr
    context = _context(setup, step)
    stats = run_step(context, micro_batches, stop=stop)
    if stats.sums["left_out"]:
        setup.incidents.leave_out(step, stats.left_out)
    loss = stats.sums["loss"]
    grad_norm = gradients.step(setup.engine, drop=not math.isfinite(loss))
    if not math.isfinite(loss):
        setup.incidents.drop(step, "loss", loss, stats.not_finite)
        return stats, None
    if not math.isfinite(grad_norm):
        setup.incidents.drop(step, "gradient norm", grad_norm, [i for m in micro_batches for i in m.sample_ids])
        return stats, None
    if distillation:
        most = -(-job.batch.global_size // dist.get_world_size())
        distillation.learn(stats, step, job, most, setup.engine.device)
    used = {"lr": lr, "grad_norm": grad_norm, "token_beta": context.beta, "normaliser": context.normaliser}
    if context.features:
        used["feature_beta"] = context.feature_beta
    return stats, used | scheduled(setup, step)


def _context(setup: Setup, step: int) -> StepContext:
    distillation, schedules = setup.distillation, setup.schedules
    return StepContext(
        engine=setup.engine,
        head=setup.head,
        probe=setup.probe,
        top_k=setup.top_k,
        vision=setup.vision,
        job=setup.job,
        word_alignment=setup.recipe.word_alignment(setup.name),
        temperature=setup.recipe.targets.temperature,
        beta=schedules.token_beta(step),
        normaliser=distillation.normaliser.value if distillation else 1.0,
        feature_beta=schedules.feature_beta(step),
        feature_normaliser=distillation.feature_normaliser.value if distillation else 1.0,
    )


def _logger(setup: Setup, step: int) -> contextlib.AbstractContextManager[MetricsLogger | None]:
    return MetricsLogger(setup.dir, resume_step=step) if dist.get_rank() == 0 else contextlib.nullcontext()


def _export(setup: Setup) -> None:
    """Write the final model. Says why not for the one kind that Hugging Face cannot hold."""
    if not setup.job.moe.native.use_residual:
        export.write_model(setup.recipe, setup.name)
    else:
        print(
            "moe.native.use_residual: Hugging Face's layout has no place for the residual MLP and its coefficient, so "
            "no model is exported and nothing can be evaluated. The checkpoint is complete and training can go on."
        )
