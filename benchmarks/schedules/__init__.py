"""Pipeline schedules as data, the time that they leave idle, and their drawings.

`schedules` says who does what in which order, `simulate` gives it times, `draw` draws it. Training runs torch's own
schedules; `benchmarks.pipeline` compares what it measures with these.
"""
