"""Evaluations inside the run and the rules that act on them."""
