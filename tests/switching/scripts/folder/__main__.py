"""Run by the name of its folder."""

import sys

import beside

print(__name__, __file__, __spec__.name, sys.argv, sys.path[0], beside.value)
