"""Arithmetic whose results do not depend on what is computed beside it, on a CPU."""
