"""From the hardness of tokens or cells to that of a sample.

Shapes: N answer tokens (or cells) of a micro-batch, B its samples.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.recipe import HardnessConfig
from pipeline.targets.soft_targets import SoftTargets


def instance_scores(
    hardness_N: Tensor, sample_N: Tensor, num_samples: int, *, tail_weight: float, tail_share: float
) -> Tensor:
    """s_i = (1 - k) mean_t h_it + k mean(hardest ceil(tail_share * tokens) of h_it), float32 [B] on the CPU.

    0 for a sample without tokens. The second term keeps a rare hard token from vanishing in the mean. [ours]
    A sample's score depends on its own tokens alone, to the last bit, and not on the batch that it was in.
    """
    # On the CPU: GPU scatter-adds sum in any order, and resuming must be bit-exact.
    h_N, owner_N = hardness_N.detach().double().cpu().numpy(), sample_N.cpu().numpy()
    order = np.lexsort((-h_N, owner_N))
    h_N, owner_N = h_N[order], owner_N[order]
    count_B = np.bincount(owner_N, minlength=num_samples)
    place_N = np.arange(len(h_N)) - (np.cumsum(count_B) - count_B)[owner_N]
    # The small term keeps 0.2 * 15 from rounding up to 4.
    tail_B = np.ceil(tail_share * count_B - 1e-9)
    in_tail_N = place_N < tail_B[owner_N]
    mean_B = np.bincount(owner_N, h_N, num_samples) / np.maximum(count_B, 1)
    hardest_B = np.bincount(owner_N, h_N * in_tail_N, num_samples) / np.maximum(tail_B, 1)
    return torch.from_numpy((1 - tail_weight) * mean_B + tail_weight * hardest_B).float()


def prior_hardness(targets: SoftTargets) -> Tensor:
    """Hardness of tokens before any visit f32[N]: the teacher's entropy and cross-entropy, each as sqrt(1 - exp(-x)).

    The mean of both, on the scale of a visit's. [ours]
    """
    as_hardness = [torch.sqrt(-torch.expm1(-x.clamp(min=0))) for x in (targets.entropy, -targets.gold_logprob)]
    return (as_hardness[0] + as_hardness[1]) / 2


def teacher_prior(targets: SoftTargets, settings: HardnessConfig) -> float:
    """Hardness of a sample before any visit: `prior_hardness`, pooled.

    The same scale and pooling as a visit's score, so that visited and unvisited samples can be ranked together. [ours]
    """
    h_N = prior_hardness(targets)
    one = torch.zeros(len(h_N), dtype=torch.int64)
    return float(instance_scores(h_N, one, 1, tail_weight=settings.tail_weight, tail_share=settings.tail_share)[0])
