"""Code answers: programs graded by unit tests that they never see. See `grader`."""
