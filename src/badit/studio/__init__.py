"""``badit studio``: a page on this machine to try a run's adapter on."""
