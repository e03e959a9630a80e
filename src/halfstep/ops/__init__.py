"""How a tensor is rounded and multiplied: the reference in plain torch, and native kernels."""
