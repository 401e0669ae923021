"""The short training loop and what hangs on it: evaluation and gates, checkpoints, logging, signals."""
