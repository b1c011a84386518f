"""Tokens drawn on the GPU."""
