"""Continuous batching over a paged cache: scheduler, cache, sampler, runner, speculation; any architecture."""
