"""The chain: stages, recipes and the command line that ties them together."""
