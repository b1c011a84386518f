"""Architectures that the engine runs, chosen by a folder's config.json."""
