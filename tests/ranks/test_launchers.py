"""What users type, with real processes: torchrun, DeepSpeed's launcher, plain Python, and the chain of `clkd run`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import recipes
from tests.helpers.paths import ROOT
from tests.helpers.ranks import free_port
from tests.helpers.recipes import STEPS
from tests.helpers.training import losses, same_weights, saved_step, weights

BIN = Path(sys.executable).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
DEEPSPEED = (str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port")


def train_words(run: Path, *words: str) -> tuple[str, ...]:
    return ("train.py", "--config", str(run / "recipe.yaml"), "--deepspeed_config", "ds_configs/cpu_smoke.json",
            "job=clkd", *words)  # fmt: skip


def until_logged(run: Path, steps: int, process: subprocess.Popen) -> None:
    metrics = run / "jobs" / "clkd" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        time.sleep(0.02)


def test_torchrun_passes_a_signal_on_and_deepspeeds_launcher_resumes(run, uninterrupted):
    """Signalled, the ranks checkpoint; the other launcher goes on to the weights of the forked ranks' training.

    torchrun signals whole process groups: the workers that read the data get it too.
    """
    command = [*TORCHRUN, str(free_port()), *train_words(run, "data.workers=1")]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until_logged(run, 2, launcher)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(120) != 0
    assert 2 <= saved_step(run) < STEPS
    command = [*DEEPSPEED, str(free_port()), *train_words(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert same_weights(weights(run), weights(uninterrupted))
    assert losses(run) == losses(uninterrupted)


def test_a_refusal_is_an_exit_status_and_one_message(run):
    command = [sys.executable, *train_words(run, "targets.temperature=2.0", "jobs.clkd.batch.micro_size=4")]
    command[command.index("ds_configs/cpu_smoke.json")] = "ds_configs/dense.json"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-4000:]
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "temperature: store 1.0, this run 2.0" in done.stderr


def test_the_chain_goes_on_after_kill_9(run, uninterrupted):
    """`clkd run` with everything made that it can be given: the pass, the table, torchrun and two ranks, the report."""
    recipe = recipes.tiny(run)
    recipe["data"] |= {"root": str(run / "data"), "processor": str(run / "processor")}
    recipe["models"] = {"moe": {"path": str(run / "models" / "moe")}}
    recipe["targets"] |= {"teacher": str(run / "jobs" / "teacher" / "model")}
    recipe["jobs"].pop("teacher")
    del recipe["benchmark"]
    recipes.write(run / "recipe.yaml", recipe)
    command = [sys.executable, "-m", "pipeline", "run", str(run / "recipe.yaml")]
    chain = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_logged(run, 2, chain)
    chain.kill()
    assert chain.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_weights(weights(run), weights(uninterrupted))
    assert (run / "report.html").is_file()
