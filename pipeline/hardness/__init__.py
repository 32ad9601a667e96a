"""Scoring a data set's hardness, and looking at it."""
