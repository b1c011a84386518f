"""The router, routed experts for few and for many tokens."""
