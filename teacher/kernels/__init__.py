"""FP8 kernels of the teacher, each beside a plain-torch twin that runs anywhere and says what is right.

The functions here choose: Triton on a GPU with FP8 (or under `TRITON_INTERPRET=1`, for tests), the twin elsewhere.
A twin and its kernel agree to the last bit where both compute element by element. That takes operations that IEEE 754
fixes: sums whose order cannot show, division and square root rounded to nearest, an exponential made of these
(`teacher.kernels.exponential`), and kernels compiled without fused multiply-add.
"""
