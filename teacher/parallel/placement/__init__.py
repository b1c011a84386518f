"""Where experts lie, and how they move."""
