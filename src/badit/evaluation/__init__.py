"""From a trained model to numbers: greedy answers, the official metrics and the continual-learning scores."""
