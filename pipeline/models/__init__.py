"""Model families, checkpoints in Hugging Face format, upcycling, DeepSpeed's MoE layers."""
