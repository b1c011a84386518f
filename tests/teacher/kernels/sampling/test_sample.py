"""The drawing kernel takes the tokens that its twin takes from sorted rows."""

from __future__ import annotations

import pytest
import torch

from teacher.kernels.sampling.sample import Settings, draw, draw_twin

CUTS = {
    "none": (1.0, 0.0, 0),
    "nucleus": (0.9, 0.0, 0),
    "narrow nucleus": (0.05, 0.0, 0),
    "top-k": (1.0, 0.0, 5),
    "one": (1.0, 0.0, 1),
    "min-p": (1.0, 0.1, 0),
    "all": (0.8, 0.02, 40),
    "min-p of one": (1.0, 1.0, 0),
}


def settings(num_rows: int, num_tokens: int, cut: tuple[float, float, int], device: str) -> Settings:
    top_p, min_p, top_k = cut
    uniform = torch.rand(num_rows, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    uniform[0] = 0.0
    columns = [torch.full((num_rows, 1), value, dtype=torch.float64) for value in (top_p, min_p, top_k or num_tokens)]
    return Settings(*(column.to(device) for column in (uniform, *columns)))


@pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("kind", ["smooth", "peaked", "ties", "flat", "one hot"])
def test_the_kernel_draws_what_its_twin_draws(device: str, cut: tuple[float, float, int], kind: str) -> None:
    sizes = [(64, 129_280), (200, 5_000), (7, 640)] if device == "cuda" else [(2, 300)]
    for num_rows, num_tokens in sizes:
        logits = torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(num_tokens))
        logits *= {"smooth": 1.0, "peaked": 6.0, "ties": 2.0, "flat": 0.0, "one hot": 0.0}[kind]
        if kind == "ties":
            logits = logits.round()
        if kind == "one hot":
            logits[:, 50] = 200.0
        probabilities = logits.softmax(dim=-1).to(device)
        given = settings(num_rows, num_tokens, cut, device)
        got, wanted = draw(probabilities, given), draw_twin(probabilities, given)
        if kind in ("flat", "ties"):  # a sum's last bit may move the rank among thousands of equal ones by one
            same = probabilities.gather(1, got[:, None]) == probabilities.gather(1, wanted[:, None])
            assert same.all()
            assert (got - wanted).abs().double().median() <= (1 if kind == "flat" else 400)
        else:
            assert (got != wanted).sum() <= num_rows // 50  # the same where two cumulative sums differ in a last bit


def test_the_kernel_draws_in_proportion(device: str) -> None:
    """Chi-square over equally spaced uniform numbers: each token as often as its probability says, to one."""
    num_rows = 4_000 if device == "cuda" else 40
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])
    uniform = (torch.arange(num_rows, dtype=torch.float64) + 0.5)[:, None] / num_rows
    ones = torch.ones_like(uniform)
    given = Settings(*(column.to(device) for column in (uniform, ones, 0 * ones, 5 * ones)))
    counts = torch.bincount(draw(probabilities.expand(num_rows, -1).to(device), given), minlength=5).cpu()
    assert (counts - probabilities * num_rows).abs().max() <= 1
