"""Whole training steps against SGD's; `python -m benchmarks.step`."""
