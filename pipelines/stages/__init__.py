"""The stages of the chain, one module each: a function of inputs and config that returns a StageManifest."""
