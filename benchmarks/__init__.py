"""Benchmarks: one file per claim; raw results with device, versions and commit in results/."""
