"""Compile the one DeepSpeed operator that CPU collectives use, so that no first training step waits for it."""

from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from pipeline.training import operators

if __name__ == "__main__":
    operators.prepare()
    ShareMemCommBuilder().load(verbose=False)
    print("DeepSpeed's shared-memory collectives are built")
