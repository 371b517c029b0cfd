"""Base models: a folder, a model on the hub, or the built-in one."""
