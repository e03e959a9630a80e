"""A switch at home in other people's training loops: one module a framework, imported by its user only."""
