"""Cross-entropy of gold answers under a model, teacher-forced: a finer measure than scores of generated answers.

Shapes: B samples, S positions of the padded batch, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.evaluation.generate import model_inputs
from pipeline.method.losses import IGNORE, cross_entropy_per_token


@torch.inference_mode()
def gold_cross_entropy(
    model: PreTrainedModel,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    on_progress: Callable[[int], object] = lambda count: None,
) -> dict[str, tuple[float, int]]:
    """By sample_id: -log q of the gold answer in nats, summed over its tokens and its end token, and their number.

    Args:
        model: in evaluation mode.
        on_progress: called with the number of samples of every finished batch.

    Raises:
        DataError: a sample without an answer, or one that cannot be encoded.
    """
    measured: dict[str, tuple[float, int]] = {}
    for start in range(0, len(samples), batch_size):
        encoded = [processor.encode(sample) for sample in samples[start : start + batch_size]]
        batch = processor.collate(encoded)
        logits_BSV = model(**model_inputs(batch, model.device), use_cache=False).logits[:, :-1]
        labels_BS = batch["labels"][:, 1:].to(logits_BSV.device)  # row t predicts token t + 1
        ce_BS = cross_entropy_per_token(logits_BSV.flatten(0, 1), labels_BS.flatten()).view_as(labels_BS)
        tokens_B = (labels_BS != IGNORE).sum(1).tolist()
        sums_B = ce_BS.double().sum(1).tolist()
        measured |= {e.sample_id: (s, n) for e, s, n in zip(encoded, sums_B, tokens_B, strict=True)}
        on_progress(len(encoded))
    return measured
