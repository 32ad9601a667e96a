"""Uneven global batches of eight samples, models with a starved expert, and one torch process to compare with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.sample import Sample, question
from tests.helpers import tiny, tiny_data

LENGTHS = (29, 7, 18, 12, 9, 23, 5, 14)
"""Tokens of each sample. On 4 ranks rank r has samples r and r + 4."""
ROUTER = {"balance": 0.1, "z": 0.01}
"""Weights of the router losses, large enough to be seen."""
LR, CLIP = 1.0, 0.05
STOPS, NEW_TOKENS = list(range(0, 120, 6)), 12
"""Tokens that end a continuation: so many that continuations end at different lengths."""


def model(*, starved: bool = False) -> Any:
    """tiny.moe_model; `starved`: no token chooses the last expert of any layer."""
    made = tiny.moe_model()
    if starved:
        core, parameters = made.model, dict(made.named_parameters())
        # Every hidden state gets a large first component, which that expert's router row dislikes.
        with torch.no_grad():
            core.language_model.embed_tokens.weight[:, 0] = 5.0
            core.visual.merger.linear_fc2.bias[0] = 5.0
            for name, parameter in parameters.items():
                if name.endswith("mlp.gate.weight"):
                    parameter[:, 0] = 0.0
                    parameter[-1, 0] = -10.0
    return made


def sample(step: int, index: int, empty: Collection[int]) -> dict[str, Tensor]:
    """One sample: an image, then text; no labels at all if `index` is in `empty`."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(0, 100, (LENGTHS[index],), generator=generator)
    ids[:3] = torch.tensor([111, 110, 112])
    labels = ids.clone()
    labels[: LENGTHS[index] if index in empty else 4] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(4, 3 * 2 * 4 * 4, generator=generator)}


def batch(step: int, indices: Sequence[int], empty: Collection[int]) -> tuple[dict[str, Tensor], Tensor]:
    """(model inputs, labels [B, S]) of some of a step's samples."""
    return tiny.collate([sample(step, i, empty) for i in indices])


def tokens(step: int, empty: Collection[int]) -> int:
    """Labels of the step's global batch that a shifted loss sees."""
    return sum(int((sample(step, i, empty)["labels"][1:] != -100).sum()) for i in range(len(LENGTHS)))


def prompt(index: int) -> dict[str, Tensor]:
    """Model inputs of one sample to be continued: no padding."""
    return batch(0, [index], ())[0]


def questions(image: Path, count: int) -> list[Sample]:
    """Samples whose questions differ in length."""
    samples = tiny_data.corpus(image)[:count]
    return [
        replace(sample, turns=question(sample.prompt + " Look again." * i, len(sample.images)))
        for i, sample in enumerate(samples)
    ]


def hugging_face(made: Any, inputs: dict[str, Tensor], **options: Any) -> list[int]:
    """transformers' own greedy continuation, up to its first stop."""
    out = made.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=STOPS, pad_token_id=0, **options
    )
    continuation = out[0, inputs["input_ids"].shape[1] :].tolist()
    return continuation[: next((i for i, token in enumerate(continuation) if token in STOPS), NEW_TOKENS)]


@dataclass
class Record:
    """What one optimizer step measured; balance and z per layer, their weights left out."""

    loss: float
    aux: float
    norm: float
    balance_L: list[float]
    z_L: list[float]
    load_LE: list[list[int]]


def reference(
    plain: Any, steps: int, *, empty: Collection[int] = (), parts: int = 1, clip: float = CLIP
) -> list[Record]:
    """Plain SGD in one process on Hugging Face's own layers, in `parts` micro-steps of whole global batches.

    Router losses are written out here once more, from Hugging Face's router logits.
    """
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    records = []
    for step in range(steps):
        optimizer.zero_grad()
        record = Record(0.0, 0.0, 0.0, [0.0, 0.0], [0.0, 0.0], [[0] * 4, [0] * 4])
        for part in range(parts):
            size = len(LENGTHS) // parts
            inputs, labels = batch(step, range(part * size, (part + 1) * size), empty)
            output = plain(**inputs, output_router_logits=True)
            loss = tiny.loss_sum(output.logits, labels) / tokens(step, empty)
            valid_T = inputs["attention_mask"].flatten().bool()
            aux = torch.zeros(())
            for layer, logits_TE in enumerate(output.router_logits):
                balance, z, load = _router_terms(logits_TE[valid_T])
                aux = aux + (ROUTER["balance"] * balance + ROUTER["z"] * z) / parts
                record.balance_L[layer] += balance.item() / parts
                record.z_L[layer] += z.item() / parts
                record.load_LE[layer] = [a + b for a, b in zip(record.load_LE[layer], load, strict=True)]
            (loss + aux).backward()
            record.loss, record.aux = record.loss + loss.item(), record.aux + aux.item()
        record.norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), clip))
        optimizer.step()
        records.append(record)
    return records


def _router_terms(logits_TE: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """(E sum_e f_e P_e, mean squared logsumexp, tokens of each expert) of one layer's real tokens, top 2."""
    load_E = torch.zeros(logits_TE.shape[1])
    for row in logits_TE.tolist():
        for expert in sorted(range(len(row)), key=lambda e: -row[e])[:2]:
            load_E[expert] += 1
    balance = len(load_E) * (load_E / load_E.sum() * logits_TE.softmax(-1).mean(0)).sum()
    return balance, logits_TE.exp().sum(-1).log().square().mean(), load_E.int().tolist()
