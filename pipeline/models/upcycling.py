"""The tensors and the configuration of a Mixture-of-Experts model made from a dense one, layer by layer.

Each decoder MLP turns into E experts, which are copies of it, behind a router. With renormalised top-k weights
identical copies compute exactly what the MLP did [published: sparse upcycling, 2212.05055], but then the router gets no
gradient from the task: whichever experts it picks, the output is the same. So the copies are perturbed by a stated
amount, and the report says what that changes [ours; METHOD section 8].

Fine-grained experts [published: virtual groups, 2410.07524]: the MLP's columns are cut into G slices, and every slice
is copied E / G times. The slices of one copy share a row of the router, so the k chosen experts are k / G whole copies.
Each slice gets 1 / G of its copy's weight; its down projection times G makes up for that.

Shared expert [ours]: it takes the first share of the columns, its down projection times 2, behind a gate of zeros
(sigmoid 1/2); the routed experts are made from the other columns.

Shapes: E experts, H hidden size, I width of the dense MLP, R columns left to the routed experts, W width of an expert,
G = R / W slices, C = E / G copies of each, T tokens of a probe.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from pipeline.errors import ConfigError, UserError
from pipeline.models.families import DENSE_FAMILIES, MOE_FAMILIES, MoeFamily, Upcycling, text_type
from pipeline.models.hf_folder import TensorFiles
from pipeline.recipe import UpcycleConfig

PROBE_TOKENS = 64
WIDTH_MULTIPLE = 8
"""Grouped GEMM kernels read rows in units of 16 bytes: 8 values in bf16."""
_MLP = re.compile(r"(?P<prefix>.*\blayers\.(?P<layer>\d+)\.mlp\.)(?P<part>gate|up|down)_proj\.weight")
_OWN_KEYS = ("model_type", "architectures", "transformers_version")


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP, or one expert: `gate` and `up` [W, H], `down` [H, W]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, x_TH: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Output [T, H], in float32."""
        gated = activation(linear(x_TH, self.gate.float())) * linear(x_TH, self.up.float())
        return linear(gated, self.down.float())


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one model: architectures, layers, widths. Made by `plan`, which checks everything."""

    dense: PreTrainedConfig
    target: Upcycling
    family: MoeFamily
    settings: UpcycleConfig
    layers: tuple[int, ...]
    shared_width: int
    """Columns of the shared expert; 0 without one."""
    expert_width: int
    """W."""
    slices: int
    """G."""


@dataclass(slots=True)
class Changes:
    """Filled while tensors are made: how far each MoE layer is from its MLP at the start, by layer.

    The relative size of the difference, in the l2 norm, over random inputs of unit variance.
    """

    by_layer: dict[int, float] = field(default_factory=dict)


# --- plan and configuration -------------------------------------------------------------------------------


def plan(dense: PreTrainedConfig, settings: UpcycleConfig, where: str) -> Plan:
    """Check settings against a dense model.

    Raises:
        UserError: no dense model of a known family. ConfigError: settings that cannot work (all problems at once).
    """
    target = _target(dense, where)
    family = MOE_FAMILIES[target.text_type]
    text: Any = dense.get_text_config()
    layers = _layers(settings, text.num_hidden_layers)
    problems = [*_routing_problems(settings), *_layer_problems(settings, layers, text.num_hidden_layers)]
    if getattr(text, "use_sliding_window", False):
        problems.append("the dense model uses sliding-window attention, which its MoE architecture places differently")
    shared, width, slices = _widths(text, family, settings, target.text_type, problems)
    if problems:
        raise ConfigError("upcycle: " + "; ".join(problems) + ". Nothing was written.")
    return Plan(dense, target, family, settings, layers, shared, width, slices)


def _target(dense: PreTrainedConfig, where: str) -> Upcycling:
    found = (dense.model_type, text_type(dense))
    if found in DENSE_FAMILIES:
        return DENSE_FAMILIES[found]
    names = ", ".join(model if model == text else f"{model} with {text}" for model, text in DENSE_FAMILIES)
    reason = "has experts already: use it as it is" if found[1] in MOE_FAMILIES else "cannot be upcycled"
    raise UserError(
        f"{where}: model type {found[0]!r} with text model {found[1]!r} {reason}. Dense types that can be upcycled: "
        f"{names}. Nothing was written."
    )


def _layers(settings: UpcycleConfig, count: int) -> tuple[int, ...]:
    if settings.layers is not None:
        return tuple(sorted(set(settings.layers)))
    return tuple(i for i in range(count) if (i + 1) % settings.every == 0)


def _layer_problems(settings: UpcycleConfig, layers: tuple[int, ...], count: int) -> list[str]:
    if settings.layers is None:
        told = f"every {settings.every}: the model has only {count} layers, none would change"
        return [] if layers else [told]
    beyond = [i for i in layers if i >= count]
    if beyond:
        return [f"layers {beyond}: the model has layers 0 to {count - 1}"]
    return [] if layers else ["layers: the list is empty, none would change"]


def _routing_problems(settings: UpcycleConfig) -> list[str]:
    problems = []
    if settings.top_k < 2:
        problems.append("top_k 1: its renormalised weight is always 1, so the router gets no gradient; use 2 or more")
    if settings.top_k > settings.experts:
        problems.append(f"top_k {settings.top_k} exceeds experts {settings.experts}")
    return problems


def _widths(
    text: Any, family: MoeFamily, settings: UpcycleConfig, moe_type: str, problems: list[str]
) -> tuple[int, int, int]:
    """(columns of the shared expert, W, G); adds to `problems`."""
    share = settings.shared_expert
    if family.shared_expert is None and share is not None:
        problems.append(f"shared_expert {share}: {moe_type} has no shared expert; leave it out")
        share = None
    if family.shared_expert is not None and share is None:
        share = 0.5
    width = text.intermediate_size
    shared = width * (share or 0.0)
    if abs(shared - round(shared)) > 1e-6 or shared >= width:
        problems.append(
            f"shared_expert {share} of intermediate_size {width} is {shared:g}: not a whole number below {width}"
        )
        return 0, 1, 1
    rest, slices = width - round(shared), round(1 / settings.expert_width)
    if abs(1 / settings.expert_width - slices) > 1e-6 or rest % slices:
        problems.append(
            f"expert_width {settings.expert_width:g}: the {rest} columns of the MLP cannot be cut into "
            f"{1 / settings.expert_width:g} equal experts; use 1, 1/2, 1/3, ... that divide {rest}"
        )
        return round(shared), 1, 1
    problems += _slice_problems(settings, slices)
    expert = rest // slices
    if family.on_disk == "packed" and text.hidden_size in (expert, 2 * expert):
        problems.append(
            f"experts of width {expert} with hidden_size {text.hidden_size} have square packed matrices, whose layout "
            "readers cannot tell. Choose another expert_width"
        )
    problems += [
        f"{name} of width {value}: grouped matrix products need a multiple of {WIDTH_MULTIPLE}"
        for name, value in (("experts", expert), ("a shared expert", round(shared)))
        if value % WIDTH_MULTIPLE
    ]
    return round(shared), expert, slices


def _slice_problems(settings: UpcycleConfig, slices: int) -> list[str]:
    if slices == 1:
        return []
    problems = [
        f"{name} {value} is not a multiple of {slices}: expert_width {settings.expert_width:g} cuts every copy of the "
        f"MLP into {slices} experts, which are chosen together at the start"
        for name, value in (("experts", settings.experts), ("top_k", settings.top_k))
        if value % slices
    ]
    if settings.router_noise == 0.0:
        problems.append(
            "router_noise 0: with fine-grained experts all copies tie, and parts of different ones get mixed"
        )
    return problems


def moe_config(made: Plan) -> PreTrainedConfig:
    """The transformers configuration of the MoE model."""
    both = {key: value for key, value in made.dense.to_dict().items() if key not in _OWN_KEYS}
    composite = made.dense.get_text_config() is not made.dense
    text = both.pop("text_config") if composite else both
    text = {key: value for key, value in text.items() if key not in _OWN_KEYS} | _expert_settings(made)
    names: dict[str, Any] = {"architectures": [made.target.architecture]}
    if not composite:
        return AutoConfig.for_model(made.target.model_type, **text, **names)
    if "vision_config" in both and made.target.model_type != made.dense.model_type:
        # The tower is the same, its configuration class is the MoE model's.
        both["vision_config"] = {key: v for key, v in both["vision_config"].items() if key not in _OWN_KEYS}
    text = AutoConfig.for_model(made.target.text_type, **text).to_dict()
    return AutoConfig.for_model(made.target.model_type, text_config=text, **both, **names)


def _expert_settings(made: Plan) -> dict[str, Any]:
    settings, count = made.settings, made.dense.get_text_config().num_hidden_layers
    listed = settings.layers is not None
    values = {
        "num_experts": settings.experts,
        "num_experts_per_tok": settings.top_k,
        "moe_intermediate_size": made.expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1 if listed else settings.every,
        "mlp_only_layers": [i for i in range(count) if i not in made.layers] if listed else [],
    }
    return values | ({"shared_expert_intermediate_size": made.shared_width} if made.shared_width else {})


# --- weights ----------------------------------------------------------------------------------------------


def moe_tensors(
    tensors: TensorFiles, made: Plan, seed: int, where: str, changes: Changes
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the MoE model as on disk: the dense tensors, the MLPs of MoE layers replaced.

    At any time one MLP and one of the new tensors are in memory. `changes` is filled on the way.

    Raises:
        UserError: an MLP is missing from the files.
    """
    mlps: dict[int, dict[str, str]] = {}
    for name in tensors:
        match = _MLP.fullmatch(name)
        if match is None or int(match["layer"]) not in made.layers:
            yield name, tensors[name]
        else:
            mlps.setdefault(int(match["layer"]), {})[match["part"]] = name
    for layer in made.layers:
        names = mlps.get(layer, {})
        missing = [part for part in ("gate", "up", "down") if part not in names]
        if missing:
            raise UserError(
                f"{where}: decoder layer {layer} has no {missing} projection: not a complete dense checkpoint."
            )
        prefix = names["gate"].removesuffix("gate_proj.weight")
        mlp = Mlp(*(tensors[names[part]] for part in ("gate", "up", "down")))
        yield from _LayerMaker(made, prefix, mlp, seed).tensors(changes, layer)


class _LayerMaker:
    """Makes the tensors of one MoE layer out of its dense MLP."""

    def __init__(self, made: Plan, prefix: str, mlp: Mlp, seed: int) -> None:
        self.made, self.prefix, self.mlp, self.seed = made, prefix, mlp, seed
        self.dtype, self.hidden = mlp.gate.dtype, mlp.gate.shape[1]

    def tensors(self, changes: Changes, layer: int) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the layer; notes its change under `layer` in the end."""
        probe = _Probe(self.made, self.mlp, self._generator("probe", 0))
        router = self._router()
        probe.route(router)
        yield f"{self.prefix}{self.made.family.router}.weight", router
        yield from self._packed(probe) if self.made.family.on_disk == "packed" else self._each(probe)
        if self.made.shared_width:
            yield from self._shared(probe)
        changes.by_layer[layer] = probe.change()

    def _router(self) -> Tensor:
        """The router's weight [E, H]: the G slices of a copy share a row, so that they are chosen together."""
        settings, slices = self.made.settings, self.made.slices
        rows = torch.randn(settings.experts // slices, self.hidden, generator=self._generator("router", 0))
        return (rows * settings.router_noise).repeat(slices, 1).to(self.dtype)

    def _expert(self, expert: int) -> Mlp:
        """Expert `part * C + copy`: consecutive experts, which a rank holds, are of different copies: even loads."""
        made = self.made
        part = expert // (made.settings.experts // made.slices)
        begin = made.shared_width + part * made.expert_width
        columns = slice(begin, begin + made.expert_width)
        noise = made.settings.expert_noise
        gate = _perturbed(self.mlp.gate[columns], self.mlp.gate, noise, self._generator("gate", expert))
        up = _perturbed(self.mlp.up[columns], self.mlp.up, noise, self._generator("up", expert))
        down = _perturbed(self.mlp.down[:, columns], self.mlp.down, noise, self._generator("down", expert))
        return Mlp(gate.to(self.dtype), up.to(self.dtype), (down * made.slices).to(self.dtype))

    def _packed(self, probe: "_Probe") -> Iterator[tuple[str, Tensor]]:
        experts, width = self.made.settings.experts, self.made.expert_width
        gate_up = torch.empty(experts, self.hidden, 2 * width, dtype=self.dtype)
        down = torch.empty(experts, width, self.hidden, dtype=self.dtype)
        for index in range(experts):
            expert = self._expert(index)
            probe.add_expert(index, expert)
            gate_up[index, :, :width], gate_up[index, :, width:] = expert.gate.T, expert.up.T
            down[index] = expert.down.T
        yield f"{self.prefix}{self.made.family.experts}.gate_up_proj", gate_up
        yield f"{self.prefix}{self.made.family.experts}.down_proj", down

    def _each(self, probe: "_Probe") -> Iterator[tuple[str, Tensor]]:
        for index in range(self.made.settings.experts):
            expert = self._expert(index)
            probe.add_expert(index, expert)
            yield from _projections(f"{self.prefix}{self.made.family.experts}.{index}", expert)

    def _shared(self, probe: "_Probe") -> Iterator[tuple[str, Tensor]]:
        columns = slice(0, self.made.shared_width)
        shared = Mlp(self.mlp.gate[columns], self.mlp.up[columns], 2 * self.mlp.down[:, columns])
        probe.add_shared(shared)
        yield from _projections(f"{self.prefix}{self.made.family.shared_expert}", shared)
        yield (
            f"{self.prefix}{self.made.family.shared_expert_gate}.weight",
            torch.zeros(1, self.hidden, dtype=self.dtype),
        )

    def _generator(self, part: str, expert: int) -> torch.Generator:
        """Noise of a tensor depends on its own name only, not on the order in which tensors are read."""
        key = xxhash.xxh3_64_intdigest(f"{self.seed}/{self.prefix}/{part}/{expert}") >> 1
        return torch.Generator().manual_seed(key)


def _projections(prefix: str, mlp: Mlp) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.gate_proj.weight", mlp.gate
    yield f"{prefix}.up_proj.weight", mlp.up
    yield f"{prefix}.down_proj.weight", mlp.down


def _perturbed(part: Tensor, whole: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise with a standard deviation of `noise` times the whole tensor's root mean square; float32."""
    if noise == 0.0:
        return part.float()
    rms = torch.linalg.vector_norm(whole, dtype=torch.float32) / whole.numel() ** 0.5
    return torch.randn(part.shape, generator=generator).mul_(noise * rms).add_(part)


class _Probe:
    """Compares the layer with its MLP on random inputs [T, H], expert by expert as they are made."""

    def __init__(self, made: Plan, mlp: Mlp, generator: torch.Generator) -> None:
        text: Any = made.dense.get_text_config()
        self._activation: Callable[[Tensor], Tensor] = ACT2FN[text.hidden_act]
        self._top_k = made.settings.top_k
        self._x_TH = torch.randn(PROBE_TOKENS, mlp.gate.shape[1], generator=generator)
        self._dense_TH = mlp(self._x_TH, self._activation)
        self._sum_TH = torch.zeros_like(self._dense_TH)

    def route(self, router_EH: Tensor) -> None:
        """Choose experts: renormalised top-k of the softmax."""
        probs_TE = torch.softmax(linear(self._x_TH, router_EH.float()), dim=-1)
        top = probs_TE.topk(self._top_k, dim=-1)
        weights = top.values / top.values.sum(dim=-1, keepdim=True)
        self._weight_TE = torch.zeros_like(probs_TE).scatter_(1, top.indices, weights)

    def add_expert(self, index: int, expert: Mlp) -> None:
        """Add one routed expert's part of the output."""
        weight_T = self._weight_TE[:, index]
        chosen_T = weight_T > 0
        self._sum_TH[chosen_T] += weight_T[chosen_T, None] * expert(self._x_TH[chosen_T], self._activation)

    def add_shared(self, shared: Mlp) -> None:
        """Add the shared expert's part of the output, behind its gate of zeros."""
        self._sum_TH += 0.5 * shared(self._x_TH, self._activation)

    def change(self) -> float:
        """|layer - MLP| / |MLP| over all probe tokens."""
        return float((self._sum_TH - self._dense_TH).norm() / self._dense_TH.norm())
