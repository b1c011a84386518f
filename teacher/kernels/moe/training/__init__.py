"""Routed experts in FP8 with their gradients; training in BF16 does not use them yet."""
