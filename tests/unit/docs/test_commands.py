"""Every command, recipe and piece of code in README, docs/, the Makefile and the modules' docstrings is accepted.

Commands of `sh` blocks are parsed as their programs would parse them, with the recipe of docs/models.md as `mine.yaml`.
Commands in running text and docstrings may be shortened (`[job=NAME]`): their stages, modules and options must exist.
"""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from pipeline.cli import ACTIONS, STAGES, parser_of
from pipeline.data.readers import read_samples
from pipeline.errors import UserError
from pipeline.files import shipped
from pipeline.method.losses import distillation_loss
from pipeline.recipe import load_recipe
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.soft_targets import from_logits
from pipeline.targets.store import write_targets
from tests.helpers.documents import Found, blocks, commands, spans
from tests.helpers.paths import ROOT

OTHERS = {"pip", "vllm", "curl", "python3"}
"""First words of `sh` blocks that are not ours to check."""
DEEPSPEED = {"--num_gpus", "--hostfile"}
"""Options of the `deepspeed` command that pages use; asking it takes seconds."""
OURS = {"clkd", "python", "deepspeed", "torchrun", "accelerate", "make", "sbatch"}
MAKEFILE = (ROOT / "Makefile").read_text()
VOCAB, LABELS = 50, torch.tensor([1, 2, 3])
"""Of the store that the code of docs/targets.md reads."""


class Refused(Exception):
    """A command that its program would not accept."""


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise Refused(message)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    return parser.parse_intermixed_args(words)


# -- whole commands ----------------------------------------------------------------------------------------------------


def check(words: list[str], mine: Path) -> None:
    """Refused if a command as a person would type it would not be accepted."""
    words = words[: words.index(">")] if ">" in words else words
    first, rest = words[0], words[1:]
    if first == "clkd":
        check_stage(rest, mine)
    elif first == "make":
        check_make(rest)
    elif first == "sbatch":
        script = next(word for word in rest if word.endswith(".sbatch"))
        assert (ROOT / script).is_file(), script
        check_recipe(rest[rest.index(script) + 1 :], mine)
    elif first == "python" and rest[0] == "-m":
        check_module(rest[1:], mine)
    elif first == "python":
        check_script(rest, mine)
    elif first == "torchrun":
        launched = get_args_parser().parse_args(rest)
        check_launched(launched.module, [launched.training_script, *launched.training_script_args], mine)
    elif first == "deepspeed":
        module = "--module" in rest
        start = rest.index("--module") if module else rest.index("train.py")
        assert set(rest[:start:2]) <= DEEPSPEED, rest[:start]
        check_launched(module, rest[start + module :], mine)
    elif first == "accelerate":
        check_launched(True, rest[rest.index("-m") + 1 :], mine)
    else:
        assert first in OTHERS, f"no test knows `{first}`: write its check, or add it to OTHERS"


def check_launched(module: bool, words: list[str], mine: Path) -> None:
    (check_module if module else check_script)(words, mine)


def check_script(words: list[str], mine: Path) -> None:
    assert words[0] == "train.py", words
    assert (ROOT / words[0]).is_file()
    check_stage(["train", *words[1:]], mine)


def check_module(words: list[str], mine: Path) -> None:
    module, rest = words[0], words[1:]
    if module == "pipeline":
        check_stage(rest, mine)
        return
    assert module.startswith("tools."), f"`python -m {module}`: what users run is a stage of clkd"
    check_tool(module, rest)
    if "mine.yaml" in rest:
        check_recipe([word for word in rest if word == "mine.yaml" or re.match(r"[\w.]+=", word)], mine)


def check_stage(words: list[str], mine: Path) -> None:
    name, rest = words[0], words[1:]
    if name not in STAGES:
        raise Refused(f"clkd {name}: no such stage")
    options = parse(parser_of(name), rest)
    left = list(getattr(options, "words", []))
    if STAGES[name].subject == "ACTION RECIPE":
        assert left.pop(0) in ACTIONS[name]
    if STAGES[name].subject.endswith("RECIPE"):
        check_recipe([str(options.config), *left] if getattr(options, "config", None) else left, mine)
    if getattr(options, "deepspeed_config", None):
        assert (ROOT / options.deepspeed_config).is_file()
    for model in getattr(options, "model", None) or []:
        assert model in load_recipe(mine).models


def check_recipe(words: list[str], mine: Path) -> None:
    """The recipe of a command, and the values that replace its own."""
    path, overrides = words[0], words[1:]
    recipe = load_recipe(mine if path == "mine.yaml" else shipped(Path(path), "recipes"), overrides)
    assert recipe.job is None or recipe.job in recipe.jobs


def check_make(words: list[str]) -> None:
    for word in words:
        name, variable, _ = word.partition("=")
        found = re.search(rf"^{re.escape(name)} *(\?=|:(?!=))", MAKEFILE, re.MULTILINE)
        assert found, f"make {word}: no such target or variable"
        assert (found[1] == "?=") == bool(variable), word


def check_tool(module: str, words: list[str]) -> None:
    if importlib.util.find_spec(module) is None:
        raise Refused(f"python -m {module}: no such tool")
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in options_of(module):
            raise Refused(f"python -m {module}: has no option {word}")


def options_of(module: str) -> set[str]:
    """Options that a tool's file names."""
    spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(str(spec and spec.origin)).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if re.fullmatch(r"--[\w-]+", text)}


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """The recipe of docs/models.md."""
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(next(block.text for block in blocks("yaml") if block.page == "docs/models.md"))
    return path


@pytest.mark.parametrize(("where", "words"), [pytest.param(*found, id=str(found[0])) for found in commands()])
def test_a_command_is_accepted(where: Found, words: list[str], mine):
    check(words, mine)


@pytest.mark.parametrize(
    "line",
    [
        "clkd teachers mine.yaml", "clkd teacher mine.yaml --worker-count 2", "clkd evaluate mine.yaml jobs.clkd.lr=1",
        "deepspeed train.py --config mine.yaml job=other", "make demon", "sbatch slurm/training.sbatch mine.yaml",
        "python -m tools.bench.shop", "python -m tools.bench.store --column 3", "python -m pipeline.teacher mine.yaml",
        "torchrun --procs 2 train.py mine.yaml job=clkd", "clkd student mine.yaml --model none", "wget mine.yaml",
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused(line, mine):
    with pytest.raises((Refused, AssertionError, UserError, SystemExit)):
        check(shlex.split(line), mine)


def test_commands_stand_in_sh_blocks():
    for block in blocks("", "text", "console", "bash", "shell"):
        for line in block.text.splitlines():
            assert line.split(" ")[0] not in OURS, f"{block}: mark the block `sh`, so that its commands are tested"


# -- commands in running text ------------------------------------------------------------------------------------------


def shortened() -> Iterator[Found]:
    """Commands in code spans, in docstrings of modules, in comments of recipes, and in the Makefile."""
    for span in spans():
        if span.text.split()[0] in OURS:
            yield span
    for path in sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
            if line.split()[0] in OURS:
                yield Found(str(path.relative_to(ROOT)), 1, line)
    for path in sorted((ROOT / "pipeline" / "recipes").glob("*.yaml")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.startswith("#   ") and line[4:].split()[0] in OURS:
                yield Found(str(path.relative_to(ROOT)), number, line[4:].partition("   ")[0])
    for number, line in enumerate(MAKEFILE.splitlines(), 1):
        if line.startswith("\t") and "$(PY) -m " in line and "pip " not in line and "pytest" not in line:
            yield Found("Makefile", number, "python" + line.partition("$(PY)")[2])


@pytest.mark.parametrize("found", list(shortened()), ids=str)
def test_a_command_in_running_text_names_what_exists(found):
    words = [word for word in re.split(r"[\s\[\]|]+", found.text) if word and word != "..."]
    kind, rest = words[0], words[1:]
    if kind == "make":
        check_make([word for word in rest if "=" not in word])
    elif kind == "sbatch":
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".sbatch"))
    elif kind == "clkd":
        check_words(rest)
    elif {"-m", "--module"} & set(rest):
        start = rest.index("-m" if "-m" in rest else "--module")
        module, rest = rest[start + 1], rest[start + 2 :]
        check_words(rest) if module == "pipeline" else check_tool(module, rest)
    elif "train.py" in rest:
        check_words(["train", *rest[rest.index("train.py") + 1 :]])


def check_words(words: list[str]) -> None:
    """A stage that exists, with options that it has."""
    if not words or words[0] in ("STAGE", "--version", "--help"):
        return
    assert words[0] in STAGES, f"clkd {words[0]}: no such stage"
    known = parser_of(words[0])._option_string_actions
    for word in words[1:]:
        assert not word.startswith("--") or word.partition("=")[0] in known, f"clkd {words[0]}: has no option {word}"


# -- recipes, records, code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=str)
def test_a_recipe_is_valid(block, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(block.text)
    recipe = load_recipe(path)
    for name, model in recipe.models.items():
        if model.path:
            assert recipe.model_dir(f"models.{name}") == Path(model.path)


def records() -> tuple[str, str]:
    """The two JSON blocks there are, those of docs/data.md: chats, and a record of CODA-LM."""
    chat, coda_lm = (block.text for block in blocks("json"))
    return chat, coda_lm


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (160, 128)).save(path)


def test_the_chat_lines_are_read(tmp_path):
    chat, _ = records()
    (tmp_path / "train.jsonl").write_text(chat)
    for name in ("front/17.jpg", "left/18.jpg", "front/18.jpg"):
        draw(tmp_path / name)
    samples = {s.meta["id"]: s for s in read_samples("chat", tmp_path, "train")}
    assert samples["17"].prompt == "What should the ego car do?"
    assert (len(samples["18"].images), samples["18"].slice, samples["18"].answer) == (2, "corner", "A cone.")


def test_the_coda_lm_record_is_read_from_the_folders_shown(tmp_path):
    _, record = records()
    folder = tmp_path / "CODA-LM" / "Train"
    folder.mkdir(parents=True)
    (folder / "val_0001.json").write_text(record)
    (tmp_path / "slices.json").write_text('{"val_0001": "corner"}')
    draw(tmp_path / "val" / "images" / "0001.jpg")
    samples = read_samples("coda_lm", tmp_path, "Train")
    assert {s.task for s in samples} == {"general", "region", "suggestion"}
    assert {s.slice for s in samples} == {"corner"}
    assert [s.box for s in samples if s.task == "region"] == [(40, 60, 80, 50)]


@pytest.fixture
def store(tmp_path):
    """A store of one sample, whose answer is LABELS."""
    identity = {"codec": "packed", "top_k": 8, "bits": 7, "vocab_size": VOCAB, "temperature": 1.0}
    writer = StoreWriter(tmp_path / "store", identity)
    writer.plan(["one"], 1, "of the tests")
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    write_targets(writer, 0, [("one", from_logits(logits, LABELS, 8, 1.0))])
    return tmp_path / "store"


def test_the_code_for_ones_own_trainer_runs(store):
    """The blocks of docs/targets.md, one after the other, on a store that is here."""
    names: dict[str, Any] = {}
    for block in (block for block in blocks("python") if block.page == "docs/targets.md"):
        exec(compile(block.text.replace("/scratch/targets", str(store)), str(block), "exec"), names)
    assert len(names["dataset"]) == 1
    logits = torch.linspace(-1, 1, 3 * VOCAB).view(3, VOCAB).requires_grad_()
    loss = names["kd_loss"](logits, LABELS, ["one"], 12)
    loss.backward()
    whole = distillation_loss(logits, LABELS, names["targets"], torch.full((3,), 0.9))
    torch.testing.assert_close(loss, whole.loss_sum / 12)
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("block", list(blocks("python")), ids=str)
def test_code_compiles_and_its_imports_resolve(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{block}: {node.module} has no {name.name}"
