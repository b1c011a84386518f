"""The core that every stage shares: records, ledger, verification, curation, recipes, manifests. No torch, but in
`distill.training`."""
