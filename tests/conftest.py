"""What holds for every test."""

from __future__ import annotations

import os
import signal

import torch
from hypothesis import settings

# Without a GPU Triton's kernels run in its interpreter; it is asked for when triton is imported,
# which torch may do in any test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run, so that a failure is the change's; no deadline, since the machine
# may be busy. `pytest --hypothesis-profile=default` looks for new examples.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
