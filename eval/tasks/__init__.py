"""lm-eval task files, one a suite; `_r1_protocol.yaml` is what they share."""
