"""Stands where the module that measures stands, and dies in one of its recipes."""

import json
import os
import signal
import sys

print(json.dumps({"parameters": 3, "fp32": [1.0, 1.5, 2.0]}), flush=True)
for recipe in sys.argv[2:]:
    if recipe == "bf16":
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps({"recipe": recipe, "steps": [2.0], "after": 1.0, "cosine": 1.0}), flush=True)
