"""The rows of the ablation table: what each changes of the recipe's job `student`, which is CLKD. Data only.

METHOD section 9. A row that stands for two of its entries (PRD constant is KD + dynamic H2G, PRD cosine is CLKD,
1 x data is the plain row) is there once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]

KD: Values = {
    "distill": {
        "release": "constant",
        "gate": False,
        "token_tilt": (0.0, 0.0),
        "hardness_delay": 0.0,
        "features": None,
    },
    "curriculum": None,
}
"""Vanilla KD: the same share of KL throughout, every token alike, a uniform shuffle."""
SFT: Values = {"distill": None, "curriculum": None}
DENSE: Values = {"init": "models.dense"}
CONSTANT: Values = {"distill": {"release": "constant"}}
REVERSED: Values = {"distill": {"features": {"tilt": (-1.0, -1.0)}}}
EASY: Values = {"curriculum": {"competence_start": 0.3, "competence_until": 0.5}}
ALIKE: Values = {"tilt": (0.0, 0.0)}
"""Features that all count alike."""
SAMPLED: Values = {"codec": "sampled"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a training of the student, or a model that is scored as it is."""

    title: str
    job: Values = field(default_factory=dict)
    """Replaces values of `jobs.student`."""
    data: int = 1
    """Training scenes as a multiple of the smallest set."""
    targets: Values = field(default_factory=dict)
    """Replaces values of `targets`: a soft-target store of its own."""
    static: bool = False
    """Start from the base student's own hardness scores, taken once before training."""
    model: str | None = None
    """A shared job whose model is scored without training: the row has one cell, of seed 0."""


ROWS: dict[str, Row] = {
    "teacher": Row("teacher", model="teacher"),
    "base": Row("base student, before the rows' training", model="base"),
    "sft": Row("SFT", SFT),
    "kd": Row("vanilla KD", KD),
    "kd_features": Row("KD + features, no H2G", {**KD, "distill": {**KD["distill"], "features": ALIKE}}),
    "kd_static": Row("KD + features + static H2G", {**CONSTANT, "hardness": {"dynamic": False}}, static=True),
    "kd_dynamic": Row("KD + features + dynamic H2G (= CLKD, PRD constant)", CONSTANT),
    "clkd": Row("CLKD: KD + features + dynamic H2G + PRD cosine"),
    "no_features": Row("CLKD without features", {"distill": {"features": None}}),
    "gate_off": Row("CLKD, gate off", {"distill": {"gate": False}}),
    "reversed": Row("CLKD, reversed beta", REVERSED),
    "uniform": Row("CLKD, uniform order", {"curriculum": None}),
    "easy": Row("CLKD, long easy phase", EASY),
    "released": Row("CLKD, PRD to alpha 0", {"distill": {"alpha_end": 0.0}}),
    "linear": Row("CLKD, PRD linear", {"distill": {"release": "linear"}}),
    "adaptive": Row("CLKD, PRD adaptive", {"distill": {"release": "adaptive"}}),
    "instance": Row("CLKD, instance-only H2G", {"distill": {"features": ALIKE}}),
    "token": Row("CLKD, token-only H2G", {"curriculum": None, "distill": {"hardness_delay": 0.0}}),
    "clkd_sampled": Row("CLKD, sampled targets", targets=SAMPLED),
    "kd_sampled": Row("vanilla KD, sampled targets", KD, targets=SAMPLED),
    "dense_sft": Row("dense SFT", {**SFT, **DENSE}),
    "dense_kd": Row("dense vanilla KD", {**KD, **DENSE}),
    "iso_sft": Row("MoE of the dense student's active size, SFT", {**SFT, "init": "models.iso"}),
    "iso_kd": Row("MoE of the dense student's active size, vanilla KD", {**KD, "init": "models.iso"}),
    "sft_x2": Row("SFT, 2 x data", SFT, data=2),
    "clkd_x2": Row("CLKD, 2 x data", data=2),
    "sft_x4": Row("SFT, 4 x data", SFT, data=4),
    "kd_x4": Row("vanilla KD, 4 x data", KD, data=4),
    "clkd_x4": Row("CLKD, 4 x data", data=4),
    "step": Row("CLKD, PRD step", {"distill": {"release": "step"}}),
    "kd_prd": Row("KD + PRD cosine, no H2G", {**KD, "distill": {**KD["distill"], "release": "cosine"}}),
}
"""By name, in order of the table and of work."""
BASELINE = "kd"
"""Row that the others are compared with, sample by sample."""
LARGEST = max(row.data for row in ROWS.values())
"""All training scenes of the recipe, as a multiple of the smallest set."""
