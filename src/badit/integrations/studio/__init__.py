"""``badit studio``: a local web page to try a run's adapter and its gates."""
