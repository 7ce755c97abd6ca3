"""Triton kernels, one module per op; ``frame`` gives an op its backend, nothing else here is imported before one runs."""
