"""Which training habits hold for which optimizer; `python -m benchmarks.habits`."""
