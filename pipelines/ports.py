"""The port that is served at where nobody names one."""

SERVE_PORT = 8_000
