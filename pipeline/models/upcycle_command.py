"""`clkd upcycle SRC DST`: a dense checkpoint folder as the MoE model of its family, without a recipe."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.models.student import upcycle
from pipeline.recipe import UpcycleConfig

SETTINGS = "experts top_k every layers expert_width shared_expert router_noise expert_noise".split()


def main(recipe: None, options: argparse.Namespace) -> None:
    """The command `upcycle`."""
    if len(options.words) != 2:
        raise ConfigError(f"clkd upcycle: give SRC and DST, got {options.words}. Nothing was written.")
    if options.every is not None and options.layers is not None:
        raise ConfigError("clkd upcycle: --every and --layers both say which layers; give one. Nothing was written.")
    src, dst = map(Path, options.words)
    given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    try:
        config = UpcycleConfig(source=str(src), **given)
    except ValidationError as error:
        problems = [f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise ConfigError("; ".join(problems) + ". Nothing was written.") from None
    print(json.dumps(asdict(upcycle(src, dst, config, options.seed, measure_logits=options.measure_logits)), indent=1))
