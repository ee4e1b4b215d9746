"""Benchmarks: workloads, baselines, interleaved timing, suites, checked results, reports."""
