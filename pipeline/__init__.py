"""Distil a large vision-language teacher into a fast Mixture-of-Experts student.

The command `clkd` does it all. Here is what a trainer of one's own needs of it; importing `pipeline` costs no torch,
which comes with the first of these names that is used.

Distil from a store that `clkd teacher` wrote, in one's own loop:

    store = SoftTargetStore.open("runs/mine/store", None)
    for batch in loader:
        targets, _ = store.read_joined(batch["sample_ids"])  # a row for each answer token, sample after sample
        logits_NV = model(**batch["inputs"]).logits[batch["predicts"]]  # rows of the logits that predict these tokens
        targets = targets.to(logits_NV.device)
        terms = distillation_loss(logits_NV, batch["labels"], targets, 0.5, temperature=store.temperature)
        (terms.loss_sum / len(targets)).backward()

The loss is a sum: divide it once, by the answer tokens of the global batch. Answers must be cut into the tokens that
the teacher saw, the end of the turn included; labels are their ids.

    load_recipe, Recipe              a recipe's settings, checked; jobs, curriculum and so on are its sections
    read_samples                     a data set's samples, with the ids that everything is joined by
    SoftTargetStore, SoftTargets     a teacher's distributions, by sample id
    distillation_loss                cross-entropy and KL of logits; with the gate and tilt of docs/METHOD.md, if wanted
    fused_distillation_loss          the same from hidden states and the LM head's weight: never holds all logits
    HardnessTable                    how hard every sample is, kept fresh from scores
    WindowPlan                       which samples each step sees, by hardness and the recipe's curriculum
    release_alpha                    the teacher's share of the loss, by the share of training done
    upcycle                          a dense Hugging Face folder as the Mixture-of-Experts model of its family
    UserError                        what all of them raise for what the caller has to mend
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.readers import read_samples
    from pipeline.errors import UserError
    from pipeline.method.fused_head import fused_distillation_loss
    from pipeline.method.hardness import HardnessTable
    from pipeline.method.losses import distillation_loss
    from pipeline.method.plan import WindowPlan
    from pipeline.method.release import release_alpha
    from pipeline.models.student import upcycle
    from pipeline.recipe import Recipe, load_recipe
    from pipeline.targets.soft_targets import SoftTargets
    from pipeline.targets.store import SoftTargetStore

__version__ = "0.1.0"
__all__ = [
    "HardnessTable",
    "Recipe",
    "SoftTargetStore",
    "SoftTargets",
    "UserError",
    "WindowPlan",
    "distillation_loss",
    "fused_distillation_loss",
    "load_recipe",
    "read_samples",
    "release_alpha",
    "upcycle",
]
_MODULES = {
    "HardnessTable": "method.hardness",
    "Recipe": "recipe",
    "SoftTargetStore": "targets.store",
    "SoftTargets": "targets.soft_targets",
    "UserError": "errors",
    "WindowPlan": "method.plan",
    "distillation_loss": "method.losses",
    "fused_distillation_loss": "method.fused_head",
    "load_recipe": "recipe",
    "read_samples": "data.readers",
    "release_alpha": "method.release",
    "upcycle": "models.student",
}
"""Where each name comes from, as type checkers are told above."""


if not TYPE_CHECKING:  # to a type checker, a function of this name would make every name one of ours

    def __getattr__(name: str) -> Any:
        """Import what is asked for when it is asked for (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module 'pipeline' has no attribute {name!r}; it has {', '.join(__all__)}")
        globals()[name] = getattr(importlib.import_module(f"pipeline.{_MODULES[name]}"), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
