"""Cross-entropy of gold answers under a model, teacher-forced: a finer measure than scores of generated answers.

Shapes: B samples, L the longest answer's tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.method.losses import IGNORE, cross_entropy_per_token
from pipeline.models.generation import model_inputs


@torch.inference_mode()
def gold_cross_entropy(
    model: PreTrainedModel,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    blind: bool = False,
    on_progress: Callable[[int], object] = lambda count: None,
) -> dict[str, tuple[float, int]]:
    """By sample_id: -log q of the gold answer in nats, summed over its tokens and its end token, and their number.

    Args:
        model: in evaluation mode.
        blind: blank the images to grey.
        on_progress: called with the number of samples of every finished batch.

    Raises:
        DataError: a sample without an answer, or one that cannot be encoded; with `data.bad_samples: skip` it is not
            among those measured.
    """
    measured: dict[str, tuple[float, int]] = {}
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        encoded = [e for sample in chosen if (e := processor.encode_or_leave_out(sample, blind=blind)).problem is None]
        on_progress(len(chosen))
        if not encoded:
            continue
        # Padded on the left all answers end together, so the head has to see no more rows than the longest answer has:
        # logits of whole prompts are gigabytes with a real vocabulary.
        batch = processor.collate(encoded, side="left")
        tokens_B = [_last_answer(e.labels) for e in encoded]
        longest = max(tokens_B)
        labels_BL = batch["labels"][:, -longest:].clone()
        for labels_L, tokens in zip(labels_BL, tokens_B, strict=True):
            labels_L[: longest - tokens] = IGNORE  # earlier answers of a conversation
        labels_BL = labels_BL.to(model.device)
        out = model(**model_inputs(batch, model.device), use_cache=False, logits_to_keep=longest + 1)
        logits_BLV = out.logits[:, :-1]  # row t predicts token t + 1
        ce_BL = cross_entropy_per_token(logits_BLV.flatten(0, 1), labels_BL.flatten()).view_as(labels_BL)
        sums_B = ce_BL.double().sum(1).tolist()
        measured |= {e.sample_id: (s, n) for e, s, n in zip(encoded, sums_B, tokens_B, strict=True)}
    return measured


def _last_answer(labels_S: Tensor) -> int:
    """Tokens of the last answer, its end among them: the labels at the end."""
    return int((labels_S.flip(0) != IGNORE).long().cumprod(0).sum())
