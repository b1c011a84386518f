"""FP8 quantisation: plain, behind RMSNorm, behind SwiGLU, of weights."""
