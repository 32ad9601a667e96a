"""The method's mathematics: losses, hardness, curriculum, release. No data set, no checkpoint, no collectives."""
