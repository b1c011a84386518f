"""What drafting with the MTP layer saves: the bundled teacher on held-out problems, to their ends, with and without.

    python -m benchmarks.speculation [--batches 1,64] [--temperature 0.6] [--repeats 3]

One thread. Both sides write the same tokens, which is checked, and take turns; a row has the median of the repeats.
Results go to benchmarks/results/<device>/speculation.json.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.device import device_name, write_result
from benchmarks.generation import BUNDLED, ROOT, seconds, tokenised_prompts
from teacher.model.checkpoint import load_checkpoint
from teacher.serve.engine import Engine
from teacher.serve.latent_model import LatentModel
from teacher.serve.sampler import Draw
from teacher.serve.sequence import Sequence

MAX_TOKENS = 400  # more than any of these texts has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = LatentModel.of(load_checkpoint(BUNDLED), with_mtp=True)
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        prompts = tokenised_prompts(BUNDLED, model.config, max(8, 3 * batch))
        rows.append(row(model, prompts, batch, arguments.temperature, arguments.repeats))
        print(rows[-1], flush=True)
    result = {"device": device_name(), "versions": {"torch": torch.__version__}, "rows": rows}
    print(write_result("speculation", result).relative_to(ROOT))


def row(model: LatentModel, prompts: list[list[int]], batch: int, temperature: float, repeats: int) -> dict:
    speeds: dict[bool, list[float]] = {False: [], True: []}
    texts: dict[bool, list[list[int]]] = {}
    for _ in range(repeats):
        for speculate in (False, True):
            engine = Engine(
                model, batch_size=batch, eos_token_ids=model.config.eos_token_ids, speculate=speculate, run_ahead=False
            )
            sequences = [Sequence(n, ids, MAX_TOKENS, n, Draw(temperature)) for n, ids in enumerate(prompts)]
            taken = seconds(lambda engine=engine, sequences=sequences: list(engine.run(sequences)))
            texts[speculate] = [sequence.generated_ids for sequence in sequences]
            speeds[speculate].append(sum(map(len, texts[speculate])) / taken)
    assert texts[True] == texts[False]
    num_tokens = sum(map(len, texts[True]))
    return {
        "batch": batch,
        "temperature": temperature,
        "prompts": len(prompts),
        "tokens": num_tokens,
        "acceptance": engine.num_accepted / engine.num_drafts,
        "tokens_a_decode": (num_tokens - len(prompts)) / engine.num_drafts,  # a text's first token is the prompt's
        "tokens_per_s": statistics.median(speeds[False]),
        "speculative_tokens_per_s": statistics.median(speeds[True]),
        "times_faster": statistics.median(b / a for a, b in zip(*speeds.values(), strict=True)),
    }


if __name__ == "__main__":
    main()
