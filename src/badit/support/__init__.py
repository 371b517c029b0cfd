"""Errors, files and the environment: what every other room uses."""
