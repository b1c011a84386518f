"""Scores: lm-eval task files, the harness, honest statistics, the comparison and its report."""
