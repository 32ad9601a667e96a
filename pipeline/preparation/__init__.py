"""Before anything runs: looking at models and data, writing a recipe that fits them, checking one."""
