"""Benchmarks: `python -m benchmarks --help`. Cases as data (cases.py), one timing protocol (timing.py)."""
