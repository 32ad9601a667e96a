"""What the fork server of tests/helpers/ranks.py has imported before it forks.

Modules only: no process group, no backward, no thread. A fork has the one thread that called it, and locks that others
held stay locked.
"""

import gc
import importlib

from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from PIL import Image

from pipeline.cli import STAGES
from pipeline.training import operators
from tests.helpers.soft_targets import random_targets, roundtrip

LATER = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # and with it torch's compiler
    "tensorboard.summary",
    "torch.utils.tensorboard",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
)
"""What a training process imports while it runs."""
for _name in (*LATER, *(f"pipeline.{stage.module}" for stage in STAGES.values())):
    importlib.import_module(_name)
Image.init()
for _codec in ("packed", "compact"):
    roundtrip(random_targets(4, 100, 8), 100, _codec)  # compiled loops: loaded from their cache, or compiled, once
operators.prepare()
ShareMemCommBuilder().load(verbose=False)  # the operator of CPU collectives; each process would ask ninja for it
gc.collect()
gc.freeze()  # a fork's collector leaves these objects alone, and so the pages that it shares
