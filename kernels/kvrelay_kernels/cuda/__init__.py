"""Triton kernels, one module an op; imported only where a tensor lies on a GPU.

`registry` says how a module declares the compilations and the work of its kernels; `compile` checks
them ahead of time, without a GPU.
"""
