"""Places of experts, and how they move."""
