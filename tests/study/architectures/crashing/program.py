"""Stands where the program stands, and trains nothing."""
