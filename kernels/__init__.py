"""Triton kernels and their launchers, one module per op, named as in ``jmm_fast.ops``.

The folder lies at the root of the repository and is installed as ``jmm_fast.kernels``. Nothing here may be imported
before an op asks for the ``triton`` backend: importing a module of this package imports Triton.

Every launch says whether products and sums may be fused: Triton's default changes with version 3.10.
"""
