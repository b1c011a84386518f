"""Savings of drafting with the MTP layer: the bundled teacher on held-out problems, to their ends, with and without.

    python -m benchmarks.speculation [--batches 1,64] [--temperature 0.6] [--repeats 3]

On a GPU where there is one, else one thread. Both sides take turns; a row has the median of the repeats, and how many
texts are the same on both: all in FP32, on a GPU nearly all, since two rows' products round otherwise than one's.
Results go to benchmarks/results/<device>/speculation.json.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.device import device_name, write_result
from benchmarks.generation import BUNDLED, ROOT, seconds, tokenised_prompts
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from teacher.kernels.attention.mla_cache import PAGE
from teacher.models.latent.model import LatentModel

MAX_TOKENS = 400  # more than any of these texts has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LatentModel.load(BUNDLED, device, with_mtp=True)
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        prompts = tokenised_prompts(BUNDLED, model.config, max(8, 3 * batch))
        rows.append(row(model, prompts, batch, arguments.temperature, arguments.repeats))
        print(rows[-1], flush=True)
    versions = {"torch": torch.__version__}
    result = {"device": device_name(device), "precision": model.precision, "versions": versions, "rows": rows}
    print(write_result("speculation", result, device=device_name(device)).relative_to(ROOT))


def row(model: LatentModel, prompts: list[list[int]], batch: int, temperature: float, repeats: int) -> dict:
    speeds: dict[bool, list[float]] = {False: [], True: []}
    texts: dict[bool, list[list[int]]] = {}
    pages = batch * -(-model.max_positions // PAGE)
    ends = model.config.eos_token_ids
    engines = {
        on: Engine(model, batch_size=batch, eos_token_ids=ends, num_pages=pages, prefix_caching=False, speculate=on)
        for on in (False, True)
    }
    for repeat in range(repeats + 1):  # the first is not counted: kernels compile, graphs are captured
        for speculate, engine in engines.items():
            sequences = [Sequence(n, ids, MAX_TOKENS, n, SamplingParams(temperature)) for n, ids in enumerate(prompts)]
            taken = seconds(lambda engine=engine, sequences=sequences: list(engine.run(sequences)))
            texts[speculate] = [sequence.generated_ids for sequence in sequences]
            if repeat:
                speeds[speculate].append(sum(map(len, texts[speculate])) / taken)
    engine = engines[True]
    num_tokens = sum(map(len, texts[True]))
    num_drafts, num_accepted = engine.num_drafts / (repeats + 1), engine.num_accepted / (repeats + 1)
    return {
        "batch": batch,
        "temperature": temperature,
        "prompts": len(prompts),
        "tokens": num_tokens,
        "same_texts": sum(fast == plain for fast, plain in zip(texts[True], texts[False], strict=True)),
        "acceptance": num_accepted / num_drafts,
        "tokens_a_decode": (num_tokens - len(prompts)) / num_drafts,  # a text's first token is the prompt's
        "tokens_per_s": statistics.median(speeds[False]),
        "speculative_tokens_per_s": statistics.median(speeds[True]),
        "times_faster": statistics.median(b / a for a, b in zip(*speeds.values(), strict=True)),
    }


if __name__ == "__main__":
    main()
