"""Torch code that pre-training of the teacher and of the bases shares: the loop, the order of rows, losses.

The one part of `distill` that imports torch, and only those who train import it.
"""
