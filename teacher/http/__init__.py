"""The HTTP API in front of a teacher that takes requests at any time (`teacher.live`)."""
