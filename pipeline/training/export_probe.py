"""The engine's own logits on the fixed probe, for each checkpoint: what an export of it is held against."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.processor import Processor
from pipeline.models import probe
from pipeline.recipe import JobConfig


class ExportProbe:
    """One job's probe. A job whose experts drop tokens has none: its engine computes something else than an export."""

    def __init__(self, engine: Any, processor: Processor, job: JobConfig) -> None:
        """`engine`: DeepSpeed's, of the job's model."""
        native = job.moe.native
        drops = job.moe.layer == "native" and (native.drop_tokens or native.use_residual)
        self._engine = engine
        self._inputs = None if drops else probe.make_probe(engine.module.config, processor)

    def record(self) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
        """(arrays, state) for a checkpoint; both empty without a probe. Collective: every rank runs the forward."""
        if self._inputs is None:
            return {}, {}
        engine = self._engine
        dtype = next(engine.module.parameters()).dtype
        engine.eval()
        logits_PV = probe.probe_logits(engine, self._inputs, engine.device, dtype)
        engine.train()
        arrays = {f"{probe.PREFIX}{name}": np.asarray(array) for name, array in self._inputs.items()}
        arrays[f"{probe.PREFIX}logits"] = logits_PV
        about = {"dtype": str(dtype).removeprefix("torch."), "unit": probe.precision(engine.device, dtype)}
        return arrays, {"probe": about}
