"""Metrics of answers, and statistics over runs."""
