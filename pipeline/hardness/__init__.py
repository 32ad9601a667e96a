"""Scoring a data set's hardness, and looking at it. The table itself, and its update, are in `method/hardness.py`."""
