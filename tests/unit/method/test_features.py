"""Feature distillation against loops over single samples in plain torch: loss, gradients, hardness, ZeRO stages."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, StoreError
from pipeline.method import features
from pipeline.method.fused_head import FusedHead
from pipeline.method.losses import distillation_loss, feature_loss
from pipeline.models import checkpoint_folder
from pipeline.recipe import load_recipe
from pipeline.targets import sketches
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.sketches import Sketch, SketchStore
from pipeline.targets.soft_targets import from_logits
from pipeline.targets.store import SoftTargetStore, write_targets
from pipeline.training import checkpoint
from pipeline.training.batches import MicroBatch, Request, assemble, with_features
from pipeline.training.step import StepContext, run_step
from tests.helpers import single_rank, tiny

SAMPLES, MICRO, DIM, TOP_K, VOCAB = 8, 4, 64, 8, tiny.TEXT["vocab_size"]
IDENTITY = {"codec": "packed", "top_k": TOP_K, "bits": 7, "vocab_size": VOCAB, "temperature": 1.0}
IDENTITY |= {"sketch_layer": 1, "sketch_dim": DIM, "sketch_seed": 0}
BETA, NORMALISER, WEIGHT = 0.8, 1.3, 2.0
FEATURE_BETA, FEATURE_NORMALISER = 1.4, 0.7
ALPHA = np.array([0.9, 0.5, 0.0, 0.7, 0.0, 0.6, 0.9, 0.4], np.float32)
FEATURE_ALPHA = np.array([0.8, 0.0, 0.0, 0.5, 0.3, 0.9, 0.0, 0.2], np.float32)
"""Of some samples both terms are left, of some one, of some none."""


def grid(index: int) -> tuple[int, int]:
    """Rows and columns of image tokens: one side shorter than a sketch's 4 cells, one that 4 does not divide."""
    return ((4, 4), (3, 6), (5, 4))[index % 3]


def sample(index: int) -> Any:
    """As `Encoded`: an image, or two, then text; labels on the tail."""
    generator = torch.Generator().manual_seed(index)
    grids = [grid(index), grid(index + 1)] if index == 5 else [grid(index)]
    pictures = [torch.tensor([111, *[110] * (rows * columns), 112]) for rows, columns in grids]
    text = torch.randint(0, 100, (6 + 3 * (index % 4),), generator=generator)
    ids = torch.cat([*pictures, text])
    labels = torch.full_like(ids, -100)
    labels[-3 - index % 3 :] = ids[-3 - index % 3 :]
    thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    pixels = torch.randn(int(thw.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return SimpleNamespace(
        sample_id=f"s{index}",
        input_ids=ids,
        labels=labels,
        pixel_values=pixels,
        image_grid_thw=thw,
        grids=grids,
        problem=None,
    )


ALL = [sample(i) for i in range(SAMPLES)]


def batch_of(members: list[Any]) -> dict[str, Any]:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([m.input_ids for m in members], batch_first=True)
    return {
        "input_ids": ids,
        "labels": pad([m.labels for m in members], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(m.input_ids) for m in members], batch_first=True),
        "mm_token_type_ids": (ids == 110).int(),
        "pixel_values": torch.cat([m.pixel_values for m in members]),
        "image_grid_thw": torch.cat([m.image_grid_thw for m in members]),
    }


def teacher_targets(member: Any) -> Any:
    gold = member.labels[member.labels >= 0]
    generator = torch.Generator().manual_seed(len(member.input_ids))
    return from_logits(2 * torch.randn(len(gold), VOCAB, generator=generator), gold, TOP_K, 1.0)


def teacher_sketch(member: Any) -> Sketch:
    generator = torch.Generator().manual_seed(1000 + len(member.input_ids))
    tokens = int((member.labels >= 0).sum())
    cells, rows = (torch.randn(n, DIM, generator=generator) for n in (16 * len(member.grids), tokens))
    return Sketch(cells, rows)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[SoftTargetStore, SketchStore]:
    root = tmp_path_factory.mktemp("store")
    writer = StoreWriter(root, IDENTITY)
    made = [(m.sample_id, teacher_sketch(m)) for m in ALL]
    rows = [(i, len(s.cells_CR) + len(s.tokens_TR), sketches.encode(s)) for i, s in made]
    writer.write_shard(0, rows, "sketches")
    write_targets(writer, 0, [(m.sample_id, teacher_targets(m)) for m in ALL])
    return SoftTargetStore.open(root, IDENTITY), SketchStore.open(root, IDENTITY)


def micro_batches(
    stores: tuple[SoftTargetStore, SketchStore], alpha: Any = ALPHA, feature_alpha: Any = FEATURE_ALPHA
) -> list[MicroBatch]:
    made = []
    for start_at in range(0, SAMPLES, MICRO):
        index = np.arange(start_at, start_at + MICRO)
        members = [ALL[i] for i in index]
        own = None if feature_alpha is None else feature_alpha[index]
        micro = assemble(Request(index, alpha[index], own), members, batch_of(members), stores[0])
        made.append(micro if own is None else with_features(micro, stores[1], own, merge_size=2))
    return made


def engine_with_map(layer: int | None, stage: int = 1, **job: Any) -> StepContext:
    """An engine and what a step needs; `layer` None: no features."""
    model = tiny.moe_model().train()
    distill: dict[str, Any] = {"gate": False}
    if layer is not None:
        features.attach_map(model, DIM, seed=3)
        distill["features"] = {"student_layer": layer, "weight": WEIGHT}
    settings = {"global_size": SAMPLES, "weight_decay": 0.0, "distill": distill} | job
    engine = single_rank.engine(model, stage=stage, experts=stage > 0, persistent=0, **settings)
    config = tiny.job(micro_size=MICRO, **settings)
    head = FusedHead(engine.module)
    return StepContext(engine, head, None, 2, None, config, 1.0, BETA, NORMALISER, FEATURE_BETA, FEATURE_NORMALISER)


SGD = {"kind": "sgd", "lr": 0.5, "grad_clip": 0.0}
SLOW = pytest.mark.slow


# -- one process, one sample at a time -----------------------------------------------------------------------------


def reference_rows(hidden_SD: Tensor, member: Any) -> Tensor:
    """Means over the cells of each image, cut by hand, then the rows that predict answer tokens."""
    image, rows = hidden_SD[member.input_ids == 110], []
    for height, width in member.grids:
        tokens, image = image[: height * width].view(height, width, -1), image[height * width :]
        for row in range(4):
            for column in range(4):
                top, bottom = row * height // 4, -(-(row + 1) * height // 4)
                left, right = column * width // 4, -(-(column + 1) * width // 4)
                rows.append(tokens[top:bottom, left:right].flatten(0, 1).mean(0))
    return torch.stack([*rows, *hidden_SD[(member.labels >= 0).nonzero()[:, 0] - 1]])


def reference_step(model: Any, weight_RD: Tensor, layer: int, stores: Any) -> tuple[Tensor, dict[str, float]]:
    """(METHOD section 7's loss of the global batch, instance hardness by sample), Hugging Face's own hidden states."""
    tokens = sum(int((m.labels >= 0).sum()) for m in ALL)
    rows = tokens + sum(16 * len(m.grids) for m in ALL)
    loss, scores = torch.zeros(()), {}
    for member, alpha, feature_alpha in zip(ALL, ALPHA, FEATURE_ALPHA, strict=True):
        inputs = batch_of([member])
        labels = inputs.pop("labels")[0]
        out = model(**inputs, output_hidden_states=True, use_cache=False)
        answer = (labels >= 0).nonzero()[:, 0]
        terms = distillation_loss(
            out.logits[0, answer - 1], labels[answer], stores[0].read(member.sample_id),
            torch.full((len(answer),), float(alpha)), beta=BETA, normaliser=NORMALISER,
        )  # fmt: skip
        loss = loss + terms.loss_sum / tokens
        sketch = stores[1].read(member.sample_id)
        wanted = torch.cat([sketch.cells_CR, sketch.tokens_TR])
        if alpha > 0:  # features have a hardness of their own, which is not in it
            scores[member.sample_id] = pool([min(max(float(kl), 0.0), 6.0) for kl in terms.kl_N])
        if feature_alpha > 0:
            for q, p in zip(reference_rows(out.hidden_states[layer][0], member) @ weight_RD.T, wanted, strict=True):
                g = (1 - (q @ p) / (q.norm() * p.norm())) / 2
                f = torch.exp(FEATURE_BETA * (2 * g.detach() - 1)) / FEATURE_NORMALISER
                loss = loss + WEIGHT * float(feature_alpha) * f * g / rows
    return loss, scores


def pool(values: list[float]) -> float:
    hardest = sorted(values, reverse=True)[: -(-len(values) // 5)]
    return float(0.5 * np.mean(values) + 0.5 * np.mean(hardest))


@pytest.mark.parametrize(("stage", "layer"), [(0, 2), (1, 2), (1, 4), (2, 3), pytest.param(3, 2, marks=SLOW)])
def test_every_zero_stage_trains_w_and_student_like_plain_torch(stores: Any, stage: int, layer: int) -> None:
    """Two micro-batches, uneven samples, some released from either term; layer 4 of 4 is what the head reads."""
    plain = tiny.moe_model().train()
    context = engine_with_map(layer, stage, **SGD)
    features.attach_map(plain, DIM, seed=3)
    weight = plain.feature_map.weight
    first = weight.detach().clone()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(2):
        loss, scores = reference_step(plain, weight, layer, stores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stats = run_step(context, micro_batches(stores))
        context.engine.step()
        sums = stats.sums
        total = sums["loss"] / sums["tokens"] + WEIGHT * sums["feature_loss"] / sums["features"]
        assert total == pytest.approx(loss.item(), rel=1e-5)
        found = dict(zip(torch.cat(stats.index).tolist(), torch.cat(stats.scores).tolist(), strict=True))
        assert {f"s{i}": s for i, s in found.items()} == pytest.approx(scores, abs=1e-5)
    found_all = single_rank.parameters(context.engine)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found_all[name], parameter.detach(), rtol=1e-4, atol=2e-6, msg=name)
    assert (weight.detach() - first).abs().max() > 1e-3


def test_activation_checkpointing_changes_nothing(stores: Any) -> None:
    plain, saving = (engine_with_map(2, 2, **SGD) for _ in range(2))
    saving.engine.module.gradient_checkpointing_enable({"use_reentrant": False})
    for context in (plain, saving):
        run_step(context, micro_batches(stores))
        context.engine.step()
    wanted = single_rank.parameters(plain.engine)
    for name, found in single_rank.parameters(saving.engine).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_w_runs_on_no_rows_once_everything_is_released(stores: Any) -> None:
    """ZeRO expects W's gradient from every rank in every micro-step; and it is then exactly the training without."""
    without, released = engine_with_map(None), engine_with_map(2)
    for _ in range(2):
        for context, alpha in ((without, None), (released, np.zeros(SAMPLES, np.float32))):
            run_step(context, micro_batches(stores, feature_alpha=alpha))
            context.engine.step()
    wanted, found = (single_rank.parameters(c.engine) for c in (without, released))
    assert found.keys() - wanted.keys() == {"feature_map.weight"}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_weight_zero_is_the_same_as_no_features() -> None:
    config = tiny.job(distill={"features": {"student_layer": 2, "weight": 0.0}})
    assert config.distill is not None
    assert config.distill.active_features is None
    assert StepContext(None, None, None, 2, None, config, 1.0, 0.0, 1.0).features is None  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=SLOW)])
def test_resumed_equals_uninterrupted(stores: Any, tmp_path: Any, stage: int) -> None:
    """AdamW and clipping; W and its moments come back with everything else."""
    context = engine_with_map(2, stage, lr=0.01)

    def train(context: StepContext, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(run_step(context, micro_batches(stores)).sums["feature_loss"])
            context.engine.step()
        return losses

    train(context, 2)
    folder = checkpoint.save(context.engine, tmp_path, 2, {}, {}, 1)
    assert "feature_map.weight" in checkpoint_folder.parameter_names(folder)
    wanted = train(context, 2)
    other = engine_with_map(2, stage, lr=0.01)
    checkpoint.load(other.engine, tmp_path)
    assert train(other, 2) == wanted
    ours, theirs = single_rank.parameters(other.engine), single_rank.parameters(context.engine)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- the loss --------------------------------------------------------------------------------------------------------


def test_a_student_that_sees_as_its_teacher_has_no_feature_hardness() -> None:
    torch.manual_seed(0)
    sketch_JR = torch.randn(9, DIM)
    terms = feature_loss(3.0 * sketch_JR, sketch_JR, torch.ones(9), beta=1.0)
    assert terms.distance_J.abs().max() < 1e-6
    assert feature_loss(-sketch_JR, sketch_JR, torch.ones(9)).distance_J == pytest.approx(1.0)


def test_the_tilt_leaves_the_terms_size() -> None:
    """`weighted_sum / plain_sum` is what the normaliser has to be."""
    torch.manual_seed(0)
    mapped, sketch, alpha = torch.randn(50, DIM), torch.randn(50, DIM), torch.rand(50)
    first = feature_loss(mapped, sketch, alpha, beta=1.0)
    mean = float(first.weighted_sum / first.plain_sum)
    f = torch.exp(2 * first.distance_J - 1) / mean
    again = feature_loss(mapped, sketch, alpha, beta=1.0, normaliser=mean)
    assert float(again.loss_sum) == pytest.approx(float((alpha * f * first.distance_J).sum()), rel=1e-5)
    flat = feature_loss(mapped, sketch, alpha)
    assert float(again.loss_sum) == pytest.approx(float(flat.loss_sum), rel=1e-5)
    assert float(flat.loss_sum) == pytest.approx(float((alpha * first.distance_J).sum()), rel=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_store_without_sketches_is_refused_when_the_recipe_is_read(tmp_path: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {dir: r}\nmodels: {a: {path: x}}\ntargets: {teacher: models.a}\n"
        "jobs: {clkd: {init: models.a, steps: 1, distill: {features: {student_layer: 1}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"jobs\.clkd\.distill\.features: the store keeps no feature sketches"):
        load_recipe(path)
    assert load_recipe(path, ["targets.sketches={layer: 1}"]).jobs["clkd"].distill is not None
    assert load_recipe(path, ["jobs.clkd.distill.features.weight=0"]).jobs["clkd"].distill is not None
    with pytest.raises(ConfigError, match=r"features\.release_to 0\.1 lies before release_from 0\.5"):
        load_recipe(path, ["targets.sketches={layer: 1}", "jobs.clkd.distill.features.release_to=0.1"])


def test_a_layer_that_the_student_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="student_layer is 5, but the student has 4 decoder layers"):
        features.HiddenStates(tiny.moe_model(), 5, features.SETTING, "student")


def test_sketches_of_another_answer_are_refused(stores: Any) -> None:
    other = copy.copy(ALL[0])
    other.labels = other.labels.clone()
    other.labels[-8] = 5
    request = Request(np.array([0]), np.ones(1, np.float32), np.ones(1, np.float32))
    micro = assemble(request, [other], batch_of([other]), None)
    with pytest.raises(StoreError, match=r"sample s0: .* 16 image cells and 3 answer tokens, this run has 16 and 4"):
        with_features(micro, stores[1], np.ones(1, np.float32), merge_size=2)


def test_released_features_are_not_read(stores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    theirs = SketchStore.read
    monkeypatch.setattr(SketchStore, "read", lambda self, i: (read.append(i), theirs(self, i))[1])
    micro_batches(stores)
    assert read == [f"s{i}" for i in range(SAMPLES) if FEATURE_ALPHA[i] > 0]
