"""What a sketch loses: the cosine of two features from their sketches, beside the exact one.

    python -m tools.bench.sketch [--json FILE] [--features FILE.safetensors] [--pairs 4000] [--seeds 5]

Pairs of Gaussian features whose cosines spread over -1..1 (`gaussian`), the same with a few channels 20 to 50 times as
large (`outliers`), and with `--features` pairs of rows of each tensor [N, D] of a file (`real_NAME`). Sketches are
those of `pipeline.targets.sketches`; float32 ones beside int8 ones say which part of the error is int8's. Errors are
over all pairs and several seeds of the projection. Writes one flat JSON object; `MEANING` says what the figures are.
Shape suffixes: N = features, P = pairs, D = width, R = width of a sketch.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError, run_main
from pipeline.evaluation import results
from pipeline.recipe import SketchConfig
from pipeline.targets.sketches import Sketch, decode, encode, projection

MEANING = {
    "bytes": "of a vector, its int8 values and scales; a sample has 4 more",
    "cosine_mean": "exact cosine, mean over the pairs",
    "cosine_sd": "the same, standard deviation",
    "bias": "mean error of the int8 sketches' cosine",
    "mean_abs": "mean |error| of the int8 sketches' cosine",
    "sd": "root of the mean squared error of the int8 sketches' cosine",
    "sd_least": "the same of the luckiest projection",
    "sd_most": "the same of the unluckiest one",
    "float_sd": "root of the mean squared error of float32 sketches: what the projection alone loses",
    "int8_sd": "root mean square of int8's cosine minus float32's: what int8 adds",
    "theory_sd": "root of the mean of (1 - cos^2)^2 / R: a Gaussian projection's sd to first order",
}
DIMS = (64, 128, 256)
_WIDTH = 1024
_OUTLIERS = 6
"""Channels that are 20 to 50 times as large."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two features to compare in each row."""

    one_PD: Tensor
    other_PD: Tensor

    def cosine(self) -> Tensor:
        """f64[P]"""
        return torch.cosine_similarity(self.one_PD.double(), self.other_PD.double(), dim=-1)


def gaussian(pairs: int, *, outliers: bool) -> Pairs:
    """Features of width 1,024 that share between -1 and 1 of themselves."""
    generator = torch.Generator().manual_seed(0)
    shared_PD, rest_PD = torch.randn(2, pairs, _WIDTH, generator=generator)
    share_P1 = torch.linspace(-1, 1, pairs)[:, None]
    scale_D = torch.ones(_WIDTH)
    if outliers:
        scale_D[torch.randperm(_WIDTH, generator=generator)[:_OUTLIERS]] = torch.linspace(20, 50, _OUTLIERS)
    return Pairs(shared_PD * scale_D, (share_P1 * shared_PD + (1 - share_P1**2).sqrt() * rest_PD) * scale_D)


def of_features(features_ND: Tensor, pairs: int) -> Pairs:
    """Random rows beside other random rows."""
    index_2P = torch.randint(len(features_ND), (2, pairs), generator=torch.Generator().manual_seed(0))
    index_2P = index_2P[:, index_2P[0] != index_2P[1]]
    return Pairs(features_ND[index_2P[0]].float(), features_ND[index_2P[1]].float())


def data(path: Path | None, pairs: int) -> Iterator[tuple[str, Pairs]]:
    """Every kind of features by name."""
    yield "gaussian", gaussian(pairs, outliers=False)
    yield "outliers", gaussian(pairs, outliers=True)
    for name, features_ND in sorted(({} if path is None else load_file(path)).items()):
        if features_ND.ndim != 2 or len(features_ND) < 2:
            raise UserError(f"{path}: tensor `{name}` is {tuple(features_ND.shape)}, but features are [N, D], N >= 2")
        yield f"real_{name}", of_features(features_ND, pairs)


def sketched_cosines(pairs: Pairs, settings: SketchConfig) -> tuple[Tensor, Tensor, float]:
    """Cosine of float32 sketches and of int8 ones, f64[P] each, and bytes of a vector."""
    matrix_DR = projection(pairs.one_PD.shape[-1], settings)
    plain = Pairs(pairs.one_PD @ matrix_DR, pairs.other_PD @ matrix_DR)
    none_0R, stored, size = torch.zeros(0, settings.dim), [], 0
    for values_PR in (plain.one_PD, plain.other_PD):
        raw = encode(Sketch(none_0R, values_PR))
        stored.append(decode(raw, len(values_PR), settings.dim).tokens_TR)
        size += raw.nbytes - 4
    return plain.cosine(), Pairs(*stored).cosine(), size / (2 * len(plain.one_PD))


def measure(pairs: Pairs, dim: int, seeds: int) -> dict[str, float]:
    """The figures of one kind of features and one width, by the names in MEANING."""
    exact_P, size = pairs.cosine(), 0.0
    floats, stored = [], []
    for seed in range(seeds):
        plain_P, stored_P, size = sketched_cosines(pairs, SketchConfig(layer=0, dim=dim, seed=seed))
        floats.append(plain_P - exact_P)
        stored.append(stored_P - exact_P)
    float_error, error = torch.cat(floats), torch.cat(stored)
    return {
        "bytes": size,
        "cosine_mean": exact_P.mean().item(),
        "cosine_sd": exact_P.std().item(),
        "bias": error.mean().item(),
        "mean_abs": error.abs().mean().item(),
        "sd": root_mean_square(error),
        "sd_least": min(map(root_mean_square, stored)),
        "sd_most": max(map(root_mean_square, stored)),
        "float_sd": root_mean_square(float_error),
        "int8_sd": root_mean_square(error - float_error),
        "theory_sd": root_mean_square((1 - exact_P**2) / dim**0.5),
    }


def root_mean_square(values: Tensor) -> float:
    """Over everything."""
    return values.square().mean().sqrt().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.sketch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--features", type=Path, help="real features, a .safetensors file of tensors [N, D]")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5, help="projections tried")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures: dict[str, object] = {"pairs": options.pairs, "seeds": options.seeds}
    print(f"{'':20}{'r':>5}" + "".join(f"{name:>12}" for name in MEANING))
    for name, pairs in data(options.features, options.pairs):
        for dim in DIMS:
            measured = measure(pairs, dim, options.seeds)
            figures |= {f"{name}_r{dim}_{what}": value for what, value in measured.items()}
            print(f"{name:20}{dim:5}" + "".join(f"{value:12.4g}" for value in measured.values()))
    if options.json:
        about = {"meaning": MEANING, "machine": results.machine(torch.device("cpu"))}
        options.json.write_text(json.dumps(figures | about, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
