"""Published architectures that were not written for halfstep, trained in its recipes."""
