"""Benchmarks: one file a question, peers in the same run, results in `results/`."""
