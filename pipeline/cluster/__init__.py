"""The whole chain: on this machine, or as Slurm jobs."""
