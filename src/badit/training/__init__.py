"""Training: from a resolved run to an adapter."""
