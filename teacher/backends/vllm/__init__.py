"""A vLLM server of our own behind the Teacher protocol."""
