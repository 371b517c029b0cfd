"""Comparisons: methods × learning rates × seeds × orders."""
