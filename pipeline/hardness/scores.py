"""Hardness of samples for one student: a forward of each beside the teacher's soft targets, as training measures it.

Shape suffixes: T = answer tokens of a sample, N = of a batch, B = samples, C = image cells (16 an image),
J = feature rows (see `features`), D = the student's width, R = width of a sketch.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.evaluation.generate import use_experts
from pipeline.files import weights_hash
from pipeline.method import features, losses
from pipeline.method.fused_head import FusedHead, fused_distillation_loss
from pipeline.method.losses import DistillationTerms
from pipeline.method.pooling import instance_scores
from pipeline.models import checkpoint_folder, experts, loading
from pipeline.models.compatibility import check_compatible, check_own_files
from pipeline.models.families import auto_class, load_config
from pipeline.recipe import DataConfig, DistillConfig, HardnessConfig, Recipe, Reference
from pipeline.targets.sketches import SketchStore
from pipeline.targets.store import SoftTargetStore
from pipeline.training.batches import MicroBatch, MicroBatches, Request, iterate

FIT_SAMPLES = 256
"""Samples that a map W is fitted on for a student that was trained without one."""
RIDGE = 1e-3
"""Strength of that fit's regularisation, as a share of the mean square of a feature."""


@dataclass(frozen=True, slots=True)
class Student:
    """A model to score for."""

    name: str
    model: PreTrainedModel
    digest: str
    """Of its weights."""
    map_RD: Tensor | None = None
    """W, of a checkpoint of a job with features."""
    layer: int | None = None
    """The layer that W reads."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What a student's forward says of one sample. Nats; all on the CPU."""

    score: float
    """s_i of METHOD section 4."""
    kl_T: Tensor
    """KL from the teacher of each answer token."""
    chased_T: Tensor
    """r of each token, what s_i pools: the KL, bounded, as far as the gate lets it count."""
    ce_T: Tensor
    """Cross-entropy of the student on the data's token."""
    teacher_ce_T: Tensor
    """Of the teacher."""
    distance_C: Tensor | None = None
    """g of each image cell; None without a W."""


# -- the student -------------------------------------------------------------------------------------------------------


def open_student(recipe: Recipe, ref: str, processor: Processor) -> Student:
    """The student that a reference names.

    Args:
        ref: `jobs.NAME`, `models.NAME`, a Hugging Face folder, or a training checkpoint: a folder `step-...`, a job's
            folder or its `checkpoints`. A job without a final model means its newest checkpoint.

    Raises:
        UserError: there is none, or it does not fit the processor.
    """
    reference, models = Reference.parse(ref), {*recipe.models, *recipe.random_models}
    if reference.model is not None and reference.model not in models:
        raise UserError(f"--student {ref}: no such model; models: {sorted(models)}")
    folder = recipe.model_dir(ref)
    if reference.job is not None and not (folder / "config.json").is_file():
        folder = recipe.job_dir(reference.job)
    if not folder.exists():
        raise UserError(f"--student {ref}: {folder} does not exist. Name jobs.NAME, models.NAME or a folder.")
    if (folder / "config.json").is_file():
        model = loading.load_model(folder, attention=loading.batch_attention())
        check_own_files(folder, processor, recipe.data)
        student = Student(ref, model, weights_hash(folder))
    else:
        student = _from_checkpoint(checkpoint_folder.find(folder), ref)
    check_compatible(student.model, processor)
    device = loading.compute_device(recipe.run.device)
    if device.type == "cpu":
        use_experts(student.model, experts.NAME)
    torch.nn.Module.to(student.model, device)
    return student


def _from_checkpoint(folder: Path, ref: str) -> Student:
    """The model of a training checkpoint, and its W if it has one."""
    checkpoint_folder.verify(folder)
    template = checkpoint_folder.read_template(folder)
    if "config.json" not in template:
        raise UserError(f"{folder}: holds no configuration of its model. Export it and name the exported folder.")
    with tempfile.TemporaryDirectory() as place:
        for name, content in template.items():
            (Path(place) / name).write_bytes(content)
        config = load_config(place)
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation=loading.batch_attention())
    parameters, map_RD = dict(model.named_parameters()), None
    with torch.no_grad():
        for name, tensor in checkpoint_folder.read_parameters(folder):
            if features.is_ours(name):
                map_RD = tensor
            else:
                parameters.pop(name).copy_(tensor)
    if parameters:
        raise UserError(f"{folder}: lacks {sorted(parameters)[:3]}; it is not a checkpoint of its own configuration.")
    model.train(False)
    settings: Any = checkpoint_folder.read_meta(folder)["state"].get("fingerprint", {})
    wanted = (settings.get("distill") or {}).get("features") or {}
    layer = wanted.get("student_layer")
    digest = xxhash.xxh3_128((folder / checkpoint_folder.MANIFEST).read_bytes()).hexdigest()
    return Student(ref, model, digest, None if layer is None else map_RD, layer)


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass
class Scorer:
    """Scores samples for a student. With `map_RD` and `layer` it measures image cells too, else tokens alone."""

    student: Student
    processor: Processor
    store: SoftTargetStore
    sketches: SketchStore | None
    data: DataConfig
    hardness: HardnessConfig
    distill: DistillConfig
    temperature: float
    batch_size: int
    map_RD: Tensor | None = None
    layer: int | None = None
    head: FusedHead = field(init=False)

    def __post_init__(self) -> None:
        self.head = FusedHead(self.student.model)
        if self.sketches is not None and self.student.map_RD is not None:
            self.map_RD, self.layer = self.student.map_RD, self.student.layer

    @property
    def has_fitted_map(self) -> bool:
        """Whether W was fitted for looking, not trained with the student."""
        return self.map_RD is not None and self.student.map_RD is None

    def visits(self, samples: Sequence[Sample]) -> Iterator[tuple[str, Visit]]:
        """(sample_id, its visit) of every sample, in an order of similar lengths.

        Raises:
            UserError: a sample that cannot be read, or has no soft targets.
        """
        for micro in self._batches(samples, with_features=self.map_RD is not None):
            terms, distance_J = self._forward(micro)
            yield from zip(micro.sample_ids, self._split(micro, terms, distance_J), strict=True)

    def fit_map(self, samples: Sequence[Sample], layer: int) -> None:
        """Fit W by ridge regression of the sketches' directions on the student's features, on some of the samples.

        Cosines ignore lengths, so the sketches are scaled to length 1. This is for looking at a student that was
        trained without features: what no linear map can find in its features, it does not see. [ours]
        """
        chosen = samples[:: max(1, len(samples) // FIT_SAMPLES)][:FIT_SAMPLES]
        self.layer = layer
        gram_DD, cross_DR = torch.zeros(()), torch.zeros(())
        for micro in self._batches(chosen, with_features=True):
            rows_JD, sketch_JR = self._features(micro)
            gram_DD = gram_DD + rows_JD.T @ rows_JD
            cross_DR = cross_DR + rows_JD.T @ torch.nn.functional.normalize(sketch_JR.double(), dim=-1)
        ridge = RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64)
        self.map_RD = torch.linalg.solve(gram_DD + ridge, cross_DR).T.float()

    def _batches(self, samples: Sequence[Sample], *, with_features: bool) -> Iterator[MicroBatch]:
        """Micro-batches of every sample once, with alpha 1 for all: the teacher's targets are read for each."""
        order = sorted(range(len(samples)), key=lambda i: samples[i].characters)
        requests = []
        for start in range(0, len(order), self.batch_size):
            index_B = np.array(order[start : start + self.batch_size])
            all_B = np.ones(len(index_B), np.float32)
            requests.append(Request(index_B, all_B, all_B if with_features else None))
        sketches = self.sketches if with_features else None
        dataset = MicroBatches(samples, self.processor, self.store, requests, None, sketches)
        yield from (micro.to(self.student.model.device, torch.float32) for micro in iterate(dataset, self.data))

    @torch.no_grad()
    def _features(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(features f64[J, D], sketches) of a batch."""
        assert self.layer is not None and micro.features is not None
        states = features.HiddenStates(self.student.model, self.layer, "--student-layer", "student")
        with states:
            self.student.model.base_model(**micro.inputs, use_cache=False)
        rows_JD = features.gather(states.hidden_BSD, micro.features.places)
        return rows_JD.double().cpu(), micro.features.sketch_JR.cpu()

    @torch.no_grad()
    def _forward(self, micro: MicroBatch) -> tuple[DistillationTerms, Tensor | None]:
        """(the loss's measures, g of every feature row)."""
        model = self.student.model
        loss = partial(
            fused_distillation_loss,
            labels_N=micro.labels_N,
            targets=micro.targets,
            alpha_N=micro.alpha_N,
            temperature=self.temperature,
            gate_scale=self.distill.gate_scale if self.distill.gate else None,
        )
        forward = partial(model, **micro.inputs, logits_to_keep=micro.keep, use_cache=False)
        if self.map_RD is None or self.layer is None or micro.features is None:
            return self.head.loss(forward, micro.rows_BW, loss), None
        with features.HiddenStates(model, self.layer, "--student-layer", "student") as states:
            terms = self.head.loss(forward, micro.rows_BW, loss)
        rows_JD = features.gather(states.hidden_BSD, micro.features.places)
        mapped_JR = rows_JD @ self.map_RD.to(rows_JD.device).T
        alpha_J = micro.features.alpha_J
        return terms, losses.feature_loss(mapped_JR, micro.features.sketch_JR, alpha_J).distance_J.cpu()

    def _split(self, micro: MicroBatch, terms: DistillationTerms, distance_J: Tensor | None) -> Iterator[Visit]:
        assert terms.kl_N is not None and micro.targets is not None
        kl_N = terms.kl_N / self.temperature**2
        chased_N = losses.chased_nats(kl_N, terms.gate_N if self.hardness.gate else None)
        score_B = self._pooled(chased_N, micro.sample_N, len(micro.sample_ids))
        counts = micro.rows_BW.sum(1).tolist()
        per_token = (kl_N, chased_N, terms.ce_N, -micro.targets.gold_logprob)
        columns = zip(*(torch.split(values_N.cpu(), counts) for values_N in per_token), strict=True)
        cells: Sequence[Tensor | None] = [None] * len(counts)
        if distance_J is not None and micro.features is not None:
            places = micro.features.places
            parts = iter(torch.split(distance_J, [*places.cells, *places.tokens]))
            cells = [None if i in micro.left_out else next(parts) for i in micro.sample_ids]
        for score, (kl_T, chased_T, ce_T, teacher_T), distance_C in zip(score_B.tolist(), columns, cells, strict=True):
            yield Visit(score, kl_T, chased_T, ce_T, teacher_T, distance_C)

    def _pooled(self, hardness_X: Tensor, sample_X: Tensor, num_samples: int) -> Tensor:
        settings = self.hardness
        return instance_scores(
            hardness_X, sample_X, num_samples, tail_weight=settings.tail_weight, tail_share=settings.tail_share
        )


def matching_layer(student_layers: int, teacher_layers: int, teacher_layer: int) -> int:
    """The student's layer at the teacher layer's share of the depth."""
    return round(student_layers * teacher_layer / teacher_layers)


def scoring_identity(scorer: Scorer, dataset: str) -> Mapping[str, Any]:
    """What a table of scores depends on."""
    return {
        **scorer.store.identity,
        "dataset": dataset,
        "student": scorer.student.digest,
        "measure": f"min(KL, {losses.MOST_NATS:g}) nats",
        "hardness": scorer.hardness.model_dump(mode="json", include={"gate", "tail_weight", "tail_share"}),
        "gate": [scorer.distill.gate_scale, losses.GATE_MARGIN] if scorer.distill.gate else None,
    }
