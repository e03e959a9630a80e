"""A package to be run by ``-m``."""
