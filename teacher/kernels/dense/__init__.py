"""The block-scaled FP8 product, and the plans by which it is launched."""
