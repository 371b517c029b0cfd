"""Training: the regrouping callback for any HF Trainer, the answer-only trainer, and one run from recipe to scores."""
