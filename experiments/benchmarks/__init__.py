"""Benchmarks: what the watermark costs."""
