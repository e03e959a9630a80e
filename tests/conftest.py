"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, so that a failure is the change's; no deadline, since the machine
# may be busy. `pytest --hypothesis-profile=default` looks for new examples.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
