"""The parts of `scripts/compare.py`, in the order in which they run.

`config` says what to compare, `digits` is the task, `training` measures,
`report` turns measurements into a table and a file, `plots` into a picture;
`cli` runs them.
"""
