"""Recipes: the schema, reading and overriding them, and the training arguments."""
