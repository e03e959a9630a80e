"""Experiments on arithmetic alone: each a pure function of a seed that returns a frozen result."""
