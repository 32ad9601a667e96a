"""No command imports what it does not run: help and refusals come at once."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.cli import STAGES
from pipeline.targets.container.shards import sealed_json
from tests.cluster.slurm_runs import write_recipe
from tests.helpers.paths import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "numpy", "pyarrow", "numba", "PIL", "matplotlib"}
RUN = """
import json, sys
from pipeline.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
        ended = "done"
    except (SystemExit, ValueError) as error:
        ended = f"{type(error).__name__} {error}"
    print("ended", ended.replace("\\n", " "))
print("modules", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def after(*commands: list[str], **variables: str) -> tuple[list[str], set[str]]:
    """How each command ended in one fresh interpreter, and what that has imported by then."""
    words = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [line[6:] for line in lines if line.startswith("ended ")], set(lines[-1].split()[1:])


def test_the_word_that_deepspeed_puts_first_is_no_stage():
    """`deepspeed --module pipeline train ...` calls `python -m pipeline --local_rank=0 train ...`."""
    ended, _ = after(["--local_rank=0", "train", "nosuch", "--deepspeed_config", "dense"])
    assert ended[0].startswith("ConfigError nosuch: no such file")


def test_help_needs_python_alone():
    ended, modules = after(["--help"], ["--version"], *([name, "--help"] for name in STAGES))
    assert ended == ["done", "done", *["SystemExit 0"] * len(STAGES)]
    assert not modules & (HEAVY | {"pydantic", "yaml"})


@pytest.mark.parametrize(
    ("words", "complaint"), [(("nosuch",), "nosuch: no such file"), (("demo", "a.b=1"), "a: unknown key")]
)
def test_a_bad_recipe_is_refused_before_anything_heavy_is_imported(words, complaint):
    needed = {
        "student": ["--model", "moe"], "train": ["--deepspeed_config", "dense"], "plan": ["--gpus", "8"],
        "record": ["--stage", "train"], "store": [], "export": ["--out", "unused"],
    }  # fmt: skip
    actions = {"store": ["verify"], "record": ["begin"]}
    reading = [name for name, stage in STAGES.items() if stage.subject.endswith("RECIPE")]
    ended, modules = after(*([name, *actions.get(name, []), *words, *needed.get(name, [])] for name in reading))
    assert len(reading) > 10
    assert all(end.startswith("ConfigError ") and complaint in end for end in ended), ended
    assert not modules & HEAVY


def test_submitting_and_status_need_no_torch(tmp_path):
    """`squeue` is a stand-in that has no job in its queue."""
    recipe = write_recipe(tmp_path / "run")
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\n")
    squeue.chmod(0o755)
    part = {"sample_ids": ["a", "b"], "shard_samples": 1}
    (tmp_path / "run" / "store").mkdir()
    (tmp_path / "run" / "store" / "part-00000.json").write_bytes(sealed_json(part))
    options = ["--deepspeed_config", "cpu_smoke", "--with", "train=--ntasks-per-node=2"]
    submit = ["submit", str(recipe), "--dry-run", *options]
    ended, modules = after(submit, ["status", str(recipe)], PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ended == ["done", "done"]
    assert not modules & (HEAVY - {"numpy"})  # of the store's index


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m pipeline --help | true"], cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stderr) == (141, b"")
