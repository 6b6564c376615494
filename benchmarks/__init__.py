"""Benchmarks against peers: one file for each topic, with results in `results/`."""
