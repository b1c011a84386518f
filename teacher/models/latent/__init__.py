"""DeepSeek-V3: multi-head latent attention in the absorbed form, routed experts, FP8 products."""
