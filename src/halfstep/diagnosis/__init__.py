"""Watch what low precision does: statistics and the report."""
