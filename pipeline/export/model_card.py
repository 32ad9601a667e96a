"""The README of an exported model: what was trained, on what, and the figures of the run that are known.

All facts come from the checkpoint's state and the export's own report; what is not there is left out.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pipeline.models.families import auto_class, moe_layers

Facts = Mapping[str, Any]

TASKS = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForCausalLM": "text-generation"}
USE = """## Use

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Licence

None is stated here: it follows from those of the starting model, the teacher and the data. Add it before you share this
folder.
"""
_CURVES = ("loss", "ce", "kl", "vision", "balance", "z", "grad_norm", "lr")
"""Metrics of a training step that say how far the run came, in the order of the table."""


def model_card(state: Facts, config: PreTrainedConfig, report: Facts, evaluated: Facts | None) -> str:
    """Text of the README.

    Args:
        state: the checkpoint's `state`: `about`, `fingerprint` (the job's settings) and `metrics`, as far as there.
        config: of the exported model.
        report: fields of `ExportReport`.
        evaluated: what `evaluate` wrote of exactly these weights: `metrics`, `scores` and `overall`; None: nothing.
    """
    about, job, metrics = (state.get(key) or {} for key in ("about", "fingerprint", "metrics"))
    loader = auto_class(config).__name__
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {TASKS[loader]}\n---\n\n"
        f"# {about.get('job', 'Exported model')}\n",
        _training(about, job) if job else "",
        _incidents(state),
        _table(_facts(about, config, report)),
        f"## Training step {report['step']}\n" if metrics else "",
        _table([(name, f"{metrics[name]:.6g}") for name in _CURVES if name in metrics]),
        _evaluation(evaluated) if evaluated else "",
        USE.format(auto_class=loader),
    ]
    return "\n".join(part for part in parts if part)


def _training(about: Facts, job: Facts) -> str:
    kind = f"distillation from `{about.get('teacher')}`" if job["distill"] else "supervised fine-tuning"
    optimizer = job["optimizer"]
    order = "hardness-ordered" if job["curriculum"] else "uniform"
    return (
        f"Trained by {kind}, starting from `{job['init']}`: {job['steps']} steps of "
        f"{job['batch']['global_size']} samples, {optimizer['kind']}, peak learning rate {optimizer['lr']:g}, gradient "
        f"norm at most {optimizer['grad_clip']:g}, "
        f"{order} sampling, seed {job['seed']}.\n"
    )


def _incidents(state: Facts) -> str:
    """Dropped steps and changed settings, if there were any."""
    lines = [
        f"From step {c['step'] + 1} on {c['setting']} was {c['after']}, {c['before']} before{_counts(c)}."
        for c in state.get("changes", [])
    ]
    if dropped := state.get("bad_steps"):
        lines.append(f"{dropped} steps with a loss or gradient that is not finite changed nothing.")
    return " ".join(lines) + "\n" if lines else ""


def _counts(change: Facts) -> str:
    """Of samples, of which there may be as many as before."""
    return f" ({change['added']:,} added, {change['removed']:,} removed)" if "added" in change else ""


def _facts(about: Facts, config: PreTrainedConfig, report: Facts) -> list[tuple[str, str]]:
    text, layers = config.get_text_config(), moe_layers(config)
    experts = f"{text.num_experts}, {text.num_experts_per_tok} per token, in layers {layers}" if layers else "none"
    return [
        ("architecture", f"`{(config.architectures or [config.model_type])[0]}`"),
        ("parameters", f"{report['total_parameters']:,}"),
        ("active per token", f"{report['active_parameters']:,}"),
        ("experts", experts),
        ("weights", f"{report['dtype']}, step {report['step']}, xxh3-128 {report['weights']}"),
        *((name, str(value)) for name, value in about.get("data", {}).items()),
    ]


def _evaluation(evaluated: Facts) -> str:
    """A line for every metric, slice and task; nothing where nothing could be scored."""
    rows, about = list[tuple[str, ...]](), list[str]()
    for metric in evaluated["metrics"]:
        groups = list(evaluated["scores"].get(metric["name"], {}).items())
        if together := evaluated["overall"].get(metric["name"]):
            groups.append(("all samples", together))
        rows += [row for part, group in groups for row in _lines(metric, part, group)]
        about += [f"- {metric['title']}, {metric['unit']}: {metric['about']}\n"] if groups else []
    if not rows:
        return ""
    body = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)
    heads = "| metric | slice | task | value | answers |\n|---|---|---|--:|--:|\n"
    return f"## Evaluation of these weights\n\n{''.join(about)}\n{heads}{body}"


def _lines(metric: Facts, part: str, group: Facts) -> list[tuple[str, ...]]:
    """A slice's value, and by task where there are several."""
    tasks = group["tasks"] if len(group["tasks"]) > 1 else {}
    named = {"all" if tasks else next(iter(group["tasks"]), "all"): group, **tasks}
    return [
        (f"{metric['title']}, {metric['unit']}", part, task, _shown(metric, found["value"]), str(found["n"]))
        for task, found in named.items()
    ]


def _shown(metric: Facts, value: float) -> str:
    return f"{100 * value:.1f}" if metric["unit"] == "%" else f"{value:.4f}"


def _cell(text: str) -> str:
    """Names of slices and tasks are the data's own."""
    return text.replace("|", "\\|").replace("\n", " ")


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return f"| | |\n|---|---|\n{body}" if rows else ""
