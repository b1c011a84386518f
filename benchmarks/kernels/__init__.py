"""Time that each kernel of the teacher takes, beside what its bytes and FLOP take at the device's measured speed.

`python -m benchmarks.kernels` prints one table. A module a family of kernels yields its cases (`case`); `timing`
measures them, `ceilings` what the device reaches, `peers` finds other implementations, `report` prints and writes.
"""
