"""Qwen2, Qwen3 and Llama: grouped-query attention over pages of keys and values."""
