"""Exports: a run as a plain LoRA or a merged model."""
