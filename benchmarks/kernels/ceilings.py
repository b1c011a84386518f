"""Speeds of this device, measured in the same run: a large copy, a large read, large products in BF16 and FP8."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.kernels.timing import microseconds

COPY_BYTES = 2 << 30
PRODUCT = 8_192


class Ceilings(NamedTuple):
    """Bytes a second of a copy (read and written both count) and of a read; FLOP a second, None where FP8 has none."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    bf16_flop_per_s: float
    fp8_flop_per_s: float | None

    def floor_us(self, size_bytes: int, flop: int, product: str | None) -> float:
        """The longer of what the bytes and what the FLOP take. `product` is the operands' type, bf16 or fp8.

        The bytes go at the faster of the two speeds: what mostly reads is faster than a copy.
        """
        peak = {"bf16": self.bf16_flop_per_s, "fp8": self.fp8_flop_per_s or self.bf16_flop_per_s}
        arithmetic = flop / peak[product] if product else 0.0
        return 1e6 * max(size_bytes / max(self.copy_bytes_per_s, self.read_bytes_per_s), arithmetic)


def measure(device: torch.device) -> Ceilings:
    on_gpu = device.type == "cuda"
    size = COPY_BYTES if on_gpu else COPY_BYTES >> 7
    n = PRODUCT if on_gpu else PRODUCT >> 4
    source = torch.randint(0, 2**31, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # The driver's copy and a kernel's: which one is faster depends on the device.
    copies = (lambda pair: pair[1].copy_(pair[0]), lambda pair: torch.bitwise_not(pair[0], out=pair[1]))
    copied = min(microseconds(copy, [(source, target)], device) for copy in copies)
    read = microseconds(lambda given: given.amax(), [source], device)
    del source, target
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    bf16 = microseconds(lambda pair: pair[0] @ pair[1].t(), [(a, b)], device)
    fp8 = None
    if on_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        pair = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        fp8 = microseconds(
            lambda p: torch._scaled_mm(p[0], p[1].t(), one, one, out_dtype=torch.bfloat16), [pair], device
        )
    flop = 2 * n**3
    return Ceilings(1e6 * 2 * size / copied, 1e6 * size / read, 1e6 * flop / bf16, 1e6 * flop / fp8 if fp8 else None)
