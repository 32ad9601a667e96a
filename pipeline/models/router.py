"""What routers decide: their logits, collected from ordinary forward passes, and the tokens of each expert.

Shape suffixes: T = tokens (batch and sequence flattened), E = experts of a layer, K = experts a token, L = MoE layers.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.families import decoder_layers, moe_family, moe_layers
from pipeline.models.moe import converted_layers


class RouterError(UserError):
    """Router logits cannot be collected from this model as it is set up."""


def expert_counts(router_logits_TE: Tensor, top_k: int, valid_T: Tensor | None = None) -> Tensor:
    """How many tokens each expert is chosen for: i64[E], summing to top_k x tokens.

    Args:
        router_logits_TE: one layer's router logits.
        top_k: experts per token.
        valid_T: bool, True where the token counts (padding False); None counts all.
    """
    chosen_TK = router_logits_TE.detach().topk(top_k, dim=-1).indices
    if valid_T is not None:
        chosen_TK = chosen_TK[valid_T]
    return torch.bincount(chosen_TK.flatten(), minlength=router_logits_TE.shape[-1])


class RouterProbe:
    """Collects every MoE layer's router logits from ordinary forward passes of the model.

    Works on Hugging Face's MoE blocks and on DeepSpeed's layers, whichever the model holds when the probe is attached.
    Logits are kept only while the *root* module's forward runs. Activation checkpointing runs layers again in backward,
    which is outside of it, so their logits are not counted twice.

    Use `take()` after each forward; a second forward without it starts afresh.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to `model` (for DeepSpeed: `engine.module`, after `deepspeed.initialize`)."""
        self._routers = _find_routers(model)
        self._layers = list(converted_layers(model).values())
        self._logits: list[Tensor | None] = [None] * len(self._routers)
        self._recording = False
        # `always_call`: a forward that fails must not leave the probe recording.
        self._handles = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._stop, always_call=True),
        ]
        self._handles += [r.register_forward_hook(self._keeper(i)) for i, r in enumerate(self._routers)]

    def __len__(self) -> int:
        """Number of MoE layers."""
        return len(self._routers)

    def take(self) -> list[Tensor]:
        """Router logits [T, E] of the last forward, one per MoE layer in layer order, gradients attached.

        Raises:
            RouterError: there was no forward since the last call, or a layer did not run.
        """
        missing = [i for i, logits in enumerate(self._logits) if logits is None]
        if missing:
            raise RouterError(f"no router logits of MoE layer(s) {missing}: run the model's forward before take()")
        taken = [logits for logits in self._logits if logits is not None]
        self._logits = [None] * len(self._routers)
        return taken

    def dropped(self) -> Tensor | None:
        """i64[L]: pairs of token and expert that each layer's last forward dropped; None if no layer can drop."""
        counts = [layer.router.dropped for layer in self._layers if hasattr(layer.router, "dropped")]
        return torch.stack(counts) if counts else None

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, module: nn.Module, inputs: Any) -> None:
        self._logits = [None] * len(self._routers)
        self._recording, self._wants_grad = True, torch.is_grad_enabled()

    def _stop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._recording = False

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._recording:
                return
            # Reentrant checkpointing runs the layers of the first forward without gradients.
            if self._wants_grad and not torch.is_grad_enabled():
                raise RouterError(
                    "reentrant activation checkpointing would lose the router losses: "
                    'enable it with {"use_reentrant": False}'
                )
            self._logits[index] = output[0] if isinstance(output, tuple) else output

        return keep


def _find_routers(model: nn.Module) -> list[nn.Module]:
    """Modules whose (first) output is a layer's router logits, in layer order."""
    converted = converted_layers(model)
    if converted:
        return [layer.router.gate for layer in converted.values()]
    config = getattr(model, "config", None)
    family = moe_family(config) if config is not None else None
    if config is None or family is None:
        return []
    layers = model.get_submodule(decoder_layers(config))
    return [layers.get_submodule(f"{i}.mlp.{family.router}") for i in moe_layers(config)]
