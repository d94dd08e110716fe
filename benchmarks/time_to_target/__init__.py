"""Time to a fixed target, every optimizer tuned alike; `python -m benchmarks.time_to_target`."""
