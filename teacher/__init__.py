"""The mixture-of-experts teacher: DeepSeek-V3's architecture, its training, its checkpoints, its backends."""
