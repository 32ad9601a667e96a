"""Answers, scores and latency of models."""
