"""The performance tables: every figure a ratio of things measured side by side in one process."""
