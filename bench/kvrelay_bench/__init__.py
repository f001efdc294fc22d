"""Benchmarks that anyone can re-run: ratios measured in one run, with the machine's limits beside them."""
