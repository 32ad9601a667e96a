"""Teacher and student of one tokenizer fit each other whatever their padding; others are refused with what differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from pipeline.benchmark.random_models import build
from pipeline.data.collate import IGNORED, collate
from pipeline.data.processor import Processor
from pipeline.errors import UserError
from pipeline.method.losses import sparse_kl_per_token
from pipeline.models.compatibility import check_compatible, check_own_files
from pipeline.models.loading import load_model, save_model
from pipeline.recipe import load_recipe
from pipeline.teacher.forward import batch_outputs
from pipeline.teacher.stage import run_pass
from tests.helpers.teacher_run import make_run, parts
from tests.helpers.tiny_data import data, make_processor

DATA = data()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return make_processor(tmp_path_factory.mktemp("run") / "processor")


@pytest.fixture
def own(processor: Processor, tmp_path: Path) -> Path:
    """A checkpoint's folder with files of its own, the same ones so far."""
    return Path(shutil.copytree(processor.origin, tmp_path / "checkpoint"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, processor: Processor) -> str:
    with pytest.raises(UserError) as error:
        check_own_files(folder, processor, DATA)
    assert str(folder) in str(error.value)
    assert processor.origin in str(error.value)
    return str(error.value)


def test_the_same_files_and_no_files_pass(own: Path, processor: Processor, tmp_path: Path) -> None:
    assert check_own_files(own, processor, DATA) == []
    assert check_own_files(Path(processor.origin), processor, DATA) == []
    (tmp_path / "bare").mkdir()
    assert check_own_files(tmp_path / "bare", processor, DATA) == ["tokenizer", "image processor"]


def swap_ids(folder: Path) -> str:
    """Two tokens of tokenizer.json change places; the words of the refusal."""
    tokens = json.loads((folder / "tokenizer.json").read_text())
    pieces = tokens["model"]["vocab"]  # [piece, score] by id
    pieces[300], pieces[301] = pieces[301], pieces[300]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return f"{pieces[301][0]!r}: 301 there, 300 here"


def nested(folder: Path) -> None:
    """As `processor.save_pretrained` of transformers 5 leaves a folder."""
    inside = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inside}))
    (folder / "preprocessor_config.json").unlink()


def without_images(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def without_settings(folder: Path) -> None:
    without_images(folder)
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("form", [nested, without_images, without_settings])
def test_swapped_tokens_are_found_in_whatever_form_a_teacher_is_saved(
    own: Path, processor: Processor, form: Callable[[Path], None]
) -> None:
    form(own)
    assert swap_ids(own) in refusal(own, processor)


def test_an_image_processor_alone_is_compared(own: Path, processor: Processor) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (own / name).unlink(missing_ok=True)
    assert check_own_files(own, processor, DATA) == ["tokenizer"]
    nested(own)
    assert check_own_files(own, processor, DATA) == ["tokenizer"]
    path = own / "processor_config.json"
    edit(path, image_processor=json.loads(path.read_text())["image_processor"] | {"image_std": [0.1, 0.2, 0.3]})
    assert "image_std: " in refusal(own, processor)


def test_tokens_with_other_ids_are_named(own: Path, processor: Processor) -> None:
    other = Processor.load(own, DATA)
    other.tokenizer.add_tokens(["zebra"])
    other.tokenizer.save_pretrained(str(own))
    told = refusal(own, processor)
    assert (
        f"1 token(s) have other ids or are missing in one; first: 'zebra': {processor.vocab_size} there, none here"
        in told
    )
    assert swap_ids(own) in refusal(own, processor)


def test_another_chat_template_is_shown_where_it_differs(own: Path, processor: Processor) -> None:
    path = own / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "driver", 1))
    told = refusal(own, processor)
    assert "chat template, from character" in told
    assert "driver" in told.split("there")[0]


def test_other_image_tokens_are_counted(own: Path, processor: Processor) -> None:
    edit(own / "preprocessor_config.json", patch_size=8, image_mean=[0.1, 0.2, 0.3])
    told = refusal(own, processor)
    assert "an image of 64 x 64: 16 tokens there, 4 here" in told
    assert "image_mean: " in told
    assert "0.1, 0.2, 0.3" in told.split("image_mean")[1].split("there")[0]


def test_stages_check_when_they_start(teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(teacher_run, tmp_path / "run"))
    template = run / "models" / "teacher" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# mine #}")
    recipe = load_recipe(run / "recipe.yaml", [f"run.dir={run}", f"data.root={run / 'data'}"])
    with pytest.raises(UserError, match="chat template"):
        run_pass(recipe)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        (template.parent / name).unlink()
    run_pass(recipe)
    assert "has no tokenizer and no image processor of its own" in capsys.readouterr().err


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    folder.mkdir()
    return make_run(folder)


def test_padding_of_the_vocabulary_changes_no_target(teacher_run: Path) -> None:
    """151,936 and 152,064 rows for one tokenizer, in small: the teacher is padded, and loud in its padding."""
    recipe = load_recipe(teacher_run / "recipe.yaml")
    processor, samples, teacher = parts(recipe)
    batch = collate([processor.encode(s) for s in samples[:4]], processor.pad_id, processor.image_token_id)
    plain = batch_outputs(teacher, batch, recipe.targets, processor.vocab_size).targets
    rows = teacher.get_output_embeddings().weight.shape[0]
    teacher.resize_token_embeddings(rows + 128, mean_resizing=False)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[processor.vocab_size :] *= 50.0
    check_compatible(teacher, processor)
    padded = batch_outputs(teacher, batch, recipe.targets, processor.vocab_size).targets
    assert padded.keys() == plain.keys()
    for sample_id, wanted in plain.items():
        got = padded[sample_id]
        assert int(got.ids.max()) < processor.vocab_size
        for name in ("ids", "logprobs", "tail_logprob", "gold_logprob", "entropy"):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-6, atol=1e-6)


def test_a_student_with_fewer_rows_than_its_teacher_learns_from_it(teacher_run: Path, tmp_path: Path) -> None:
    """The loss of its own forward against torch's kl_div over stored tokens and one bucket for the rest."""
    recipe = load_recipe(teacher_run / "recipe.yaml")
    processor, samples, teacher = parts(recipe)
    teacher.resize_token_embeddings(teacher.get_output_embeddings().weight.shape[0] + 128, mean_resizing=False)
    batch = collate([processor.encode(samples[0])], processor.pad_id, processor.image_token_id)
    (targets,) = batch_outputs(teacher, batch, recipe.targets, processor.vocab_size).targets.values()
    student = build(recipe.random_models["teacher"], processor, seed=4)
    student.resize_token_embeddings(processor.vocab_size, mean_resizing=False)  # no padding at all
    save_model(student, processor, tmp_path / "student")
    student = load_model(tmp_path / "student")
    check_compatible(student, processor)
    inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and key != "labels"}
    with torch.no_grad():
        logits_NV = student(**inputs).logits[0, (batch["labels"][0] != IGNORED).nonzero()[:, 0] - 1]
    ids, temperature = targets.ids.long(), recipe.targets.temperature
    log_q = torch.log_softmax(logits_NV.double() / temperature, -1)
    kept = torch.zeros_like(log_q, dtype=torch.bool).scatter_(1, ids, True)
    bucket = log_q.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).double()
    wanted = kl_div(torch.cat([log_q.gather(-1, ids), bucket], -1), log_p, reduction="none", log_target=True).sum(-1)
    got = sparse_kl_per_token(logits_NV, ids, targets.logprobs, targets.tail_logprob, temperature)
    torch.testing.assert_close(got, temperature**2 * wanted, rtol=1e-4, atol=1e-4, check_dtype=False)
