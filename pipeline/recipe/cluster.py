"""`cluster`: how the stages are spread over processes and jobs. Options of the command line come before it."""

from pathlib import Path

from pipeline.recipe.base import Positive, Section


class ClusterConfig(Section):
    """How the stages are spread over processes and Slurm jobs. Options of the command line come before it."""

    deepspeed: Path = Path("zero2_ep")
    """DeepSpeed JSON of training: a file, or the name of one that comes with the package. `zero2_ep`: bf16, optimizer
    and gradients shared by all ranks, experts by two; dense models train with it too."""
    teacher_tasks: Positive = 8
    """Tasks of the teacher's job array, one GPU each: a node's usual number."""
    sbatch: dict[str, str] = {}
    """More options of sbatch: by stage (`train clkd`), by kind of stage (`train`), or for `all`, of which the most
    special wins: `{all: --partition=gpu, train: --nodes=2 --time=12:00:00}`."""
