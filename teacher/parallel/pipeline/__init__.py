"""Stages of a model over ranks: schedules, overlapped passes, their weights' files."""
