"""Tools for writing recipes."""
