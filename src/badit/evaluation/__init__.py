"""Answers, metrics, scores and statistics."""
