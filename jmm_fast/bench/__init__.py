"""Benchmarks: what is compared to what, measured in pairs, and only what computes the right numbers.

``jmm_fast.bench.rows.ROWS`` is the table, ``measure`` fills it, ``jmm-fast bench`` shows it. The page
``docs/kernels/README.md`` says how the figures are made and how to read them.
"""

from jmm_fast.bench.record import measure

__all__ = ["measure"]
