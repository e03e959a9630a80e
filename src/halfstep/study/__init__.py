"""Compare: applications, the demo, its data."""
