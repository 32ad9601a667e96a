"""The method's mathematics: losses, hardness, curriculum, release. No files, no model, no collectives."""
