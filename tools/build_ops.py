"""Compile what a first run would otherwise wait for: DeepSpeed's operator of CPU collectives, the codecs' loops."""

import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from pipeline.targets.codecs import CODECS, Spec
from pipeline.targets.soft_targets import draw_offsets
from pipeline.training import operators


def compile_codecs() -> None:
    """Encode and decode one token with each codec; numba keeps the machine code beside the package."""
    logits, gold = torch.arange(40.0)[None], torch.zeros(1, dtype=torch.long)
    for codec in CODECS.values():
        spec = Spec(vocab_size=40, top_k=8, bits=codec.default_bits, draws=8)
        targets = codec.keep(logits, gold, draw_offsets("token", 1), 1.0, spec)
        codec.decode(codec.encode(targets, spec), 1, spec)


if __name__ == "__main__":
    operators.prepare()
    ShareMemCommBuilder().load(verbose=False)
    print("DeepSpeed's shared-memory collectives are built")
    compile_codecs()
    print("the codecs' loops are compiled")
