"""Tables and sentences of the documents, each from the result files of one device.

A function takes `read`, which opens benchmarks/results/<device>/<name>.json, and returns Markdown. The zoo's table is
made from its own files: its device is `published`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.readme_form import BENCHMARK_SETS, NotMeasuredError, Read, Row, table
from benchmarks.readme_scores import pico_scores, pico_seconds, small_scores

if TYPE_CHECKING:
    from distill.recipe import StudentConfig


GIB = 2**30
PROGRAM_SETS = {"humaneval": "HumanEval", "mbpp": "MBPP"}
ENGINES = {"ours": "potstill", "invariant": "potstill, batch-invariant", "vllm": "vLLM", "transformers": "transformers"}
PEERS = {"torch._scaled_mm": "cuBLAS FP8", "vLLM fused_experts (Triton)": "vLLM", "copy": "a copy of as many bytes"}
SWITCHES = {
    "none": "none",
    "moments bf16": "`moments: bf16`",
    "recompute": "`recompute: true`",
    "activations fp8": "`activations: fp8`",
    "all": "all three",
}


def serve_v3(read: Read) -> str:
    result = read("serve")
    steps: dict[int, dict[str, Row]] = {}
    for row in result["rows"]:
        if row["scenario"] == "decode":
            steps.setdefault(row["batch"], {})[row["engine"]] = row
    engines = ("ours", "vllm", "transformers")
    rows = [
        [str(batch), *(_number(of.get(engine), "step_ms", 2) for engine in engines), _share(of["ours"])]
        for batch, of in sorted(steps.items())
    ]
    prefill = {row["engine"]: row for row in result["rows"] if row["scenario"] == "prefill"}
    rates = ", ".join(f"{ENGINES[name]} {prefill[name]['tokens_per_s']:,.0f}" for name in engines if name in prefill)
    head = ["sequences", *(f"{ENGINES[engine]}, ms a step" for engine in engines), "potstill's share of the floor"]
    batch = next(iter(prefill.values()))["batch"]
    return f"{table(head, rows)}\n\nReading {batch} prompts of {result['context']:,}, tokens/s: {rates}."


def serve_students(read: Read) -> str:
    try:
        result = read("serve-students")
    except NotMeasuredError:
        return ""
    rates: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in result["rows"]:
        rates.setdefault((row["model"], row["batch"]), {})[row["engine"], row["scenario"]] = row["tokens_per_s"]
    columns = [(engine, kind) for engine in ("ours", "vllm") for kind in ("steady", "admitted")]
    rows = [
        [model, str(batch), *(f"{of[column]:,.0f}" if column in of else "" for column in columns)]
        for (model, batch), of in rates.items()
    ]
    return table(["tokens/s", "in flight", *(f"{ENGINES[engine]}, {kind}" for engine, kind in columns)], rows)


def serve_pico(read: Read) -> str:
    rates: dict[str, dict[str, float]] = {}
    batch = 64
    for row in read("serve")["rows"]:
        if row["batch"] == batch:
            rates.setdefault(row["scenario"].partition(",")[0], {})[row["engine"]] = row["tokens_per_s"]
    names = {"pico": "the pico teacher", "student": "the largest pico student"}
    rows = [[names[of], *(f"{rates[of][engine]:,.0f}" for engine in ENGINES)] for of in names]
    return table([f"tokens/s, {batch} requests at once", *ENGINES.values()], rows)


def generation(read: Read) -> str:
    rows = [
        [
            row["name"],
            str(row["shape"]["threads"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peers']['transformers generate']['tokens_per_s']:,.0f}",
            f"{row['times_faster']:.1f}",
        ]
        for row in read("generation")["rows"]
    ]
    return table(["sampling", "threads", "native, tokens/s", "transformers' `generate`", "times faster"], rows)


def drafts(read: Read) -> str:
    rows = [
        [
            str(row["batch"]),
            f"{100 * row['acceptance']:.1f}%",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['speculative_tokens_per_s']:,.0f}",
            f"{row['times_faster']:.2f}",
        ]
        for row in read("speculation")["rows"]
    ]
    return table(["sequences", "drafts accepted", "tokens/s without", "tokens/s with", "times faster"], rows)


def client(read: Read) -> str:
    result = read("client")
    names = {"whole": "whole answer", "streamed": "streamed in 32 pieces"}
    peer = next(iter(result["rows"][0]["peers"]))
    rows = [
        [
            names[row["name"]],
            *(f"{row[side]['cpu_us'] / 1000:.2f}" for side in ("bare", "potstill")),
            f"{row['peers'][peer]['cpu_us'] / 1000:.2f}",
        ]
        for row in result["rows"]
    ]
    return table(["ms of processor time a request", "bare sockets", "potstill", f"the package {peer}"], rows)


def kernels_dense(read: Read) -> str:
    peers = ("torch._scaled_mm", "vLLM CUTLASS", "torch BF16")
    rows = [
        [row["shape"].partition(" ")[0], f"{row['us']:,.1f}", _share(row), *_peers(row, peers)]
        for row in read("kernels")["rows"]
        if row["kernel"] == "block_gemm" and row["shape"].endswith("all shapes")
    ]
    return table(["rows", "ours, us", "share of the floor", *(PEERS.get(peer, peer) for peer in peers)], rows)


def kernels_experts(read: Read) -> str:
    peers = ("vLLM fused_experts (Triton)",)
    rows = [
        [f"{int(row['shape'].partition(' ')[0]):,}", f"{row['us']:,.1f}", _share(row), *_peers(row, peers)]
        for row in read("kernels")["rows"]
        if row["kernel"] == "routed experts"
    ]
    return table(["tokens", "ours, us", "share of the floor", *(PEERS[peer] for peer in peers)], rows)


def kernels_attention(read: Read) -> str:
    peers = ("FlashMLA", "FlashAttention 3", "vLLM Triton")
    rows = [
        [row["shape"], f"{row['us']:,.1f}", _share(row), *_peers(row, peers)]
        for row in read("kernels")["rows"]
        if row["kernel"] == "mla_decode BF16"
    ]
    return table(["sequences x tokens", "ours, us", "share of the floor", *peers], rows)


def exchange(read: Read) -> str:
    names = {"fixed places, dispatch": "dispatch", "fixed places, combine": "combine"}
    rows = [
        [names[row["what"]], f"{row['us']:.1f}", f"{row['peers']['all-to-all']:.1f}", f"{row['floor_us']:.1f}"]
        for row in read("parallel-part")["rows"]
        if row["what"] in names
    ]
    return table(["4,096 tokens a rank", "ours, us", "NCCL, the same bytes", "floor"], rows)


def serving_ranks(read: Read) -> str:
    rows = [
        [
            f"{row['scenario']}, {row['batch']}",
            _number(row, "step_ms", 2),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['times_one']:.2f}",
        ]
        for row in read("parallel-serving")["rows"]
        if row["ranks"] > 1
    ]
    return table(["sequences a GPU", "ms a step", "tokens/s over all GPUs", "times one GPU"], rows)


def pipelines(read: Read) -> str:
    rows = [
        [row["schedule"], f"{row['step_ms']:,.0f}", f"{row['bubble_ms']:,.0f}", f"{row['simulated_bubble_ms']:,.0f}"]
        for row in read("pipeline")["rows"]
    ]
    return table(["schedule", "ms a step", "idle", "idle by the simulator"], rows)


def placement(read: Read) -> str:
    ways = {
        "without_redundant": "no spare slots",
        "in_order": "spare slots, in order",
        "carried_over": "placed by earlier loads",
        "anew": "placed anew",
    }
    windows: dict[tuple[int, str], list[Row]] = {}
    for row in read("placement")["rows"]:
        windows.setdefault((row["nodes"], row["window"]), []).append(row)
    rows = [
        [window, str(nodes), *(_range([row[way] for row in of]) for way in ways)]
        for (nodes, window), of in windows.items()
    ]
    return table(["problems", "nodes", *ways.values()], rows)


def memory(read: Read) -> str:
    rows = [
        [
            SWITCHES[row["switch"]],
            *(f"{row[name] * 2**20 / GIB:.2f}" for name in ("moments_mib", "kept_mib", "peak_mib")),
            f"{row['step_ms']:.0f}",
        ]
        for row in read("memory")["rows"]
    ]
    return table(["switch", "moments, GiB", "kept for the backward pass", "peak of a step", "ms a step"], rows)


def graders(read: Read) -> str:
    counts = {(row["set"], row["what"]): row for row in read("graders")["rows"]}
    whats = ("gold solutions", "gold answers in other forms", "answers of other questions")
    rows = [[name, *(_of(counts[key, what]) for what in whats)] for key, name in BENCHMARK_SETS.items()]
    return table(["accepted", "gold solutions", "their answers in other forms", "answers of other questions"], rows)


def programs(read: Read) -> str:
    counts = {(row["set"], row["what"]): row for row in read("graders")["rows"]}
    whats = ("canonical solutions", "spoiled solutions")
    rows = [[name, *(_of(counts[key, what]) for what in whats)] for key, name in PROGRAM_SETS.items()]
    return table(["accepted", "canonical solutions", "the same with their results spoiled"], rows)


def decontamination(read: Read) -> str:
    rows = [
        [
            "13-grams alone" if row["min_containment"] is None else f"{row['min_containment']:g}",
            *(f"{100 * row['found']['each twelfth word'][key]:.1f}" for key in BENCHMARK_SETS),
            str(row["num_dropped"]),
        ]
        for row in read("decontamination")["rows"]
    ]
    head = ["`min_containment`", *(f"{name}, % found" for name in BENCHMARK_SETS.values()), "training questions lost"]
    return table(head, rows)


def curation(read: Read) -> str:
    rows = [
        [
            f"{row['num_traces']:,} of {row['words']} words",
            row["name"],
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_rss_mb']:,}",
            f"{row['num_kept']:,}",
        ]
        for row in read("curation")["rows"]
    ]
    return table(["traces", "filters", "processor seconds", "peak MB", "kept"], rows)


def ledger(read: Read) -> str:
    result = read("ledger")
    rows = [
        [row["run"], row["part"], f"{row['seconds']:.1f}", f"{row['peak_rss_bytes'] / 2**20:.0f}"]
        for row in result["rows"]
    ]
    return table([f"{result['num_samples']:,} samples", "part", "seconds", "peak MiB"], rows)


def zoo(read: Read) -> str:
    """The students that are called as their bases are on the Hub. From their files: `read` is not asked."""
    from students.base_folder import is_repository
    from students.zoo import list_students

    def score(student: StudentConfig, benchmark: str) -> str:
        found = student.published.get(benchmark)
        if found is None:
            return ""
        shots = "" if found.shots is None else f" ({found.shots}-shot)"
        return f"[{found.value:.1f}]({found.source}){shots}"

    rows = [
        [
            student.name,
            f"{student.num_parameters:,}",
            f"{student.context_length:,}",
            student.licence,
            score(student, "gsm8k"),
            score(student, "math"),
        ]
        for student in list_students()
        if is_repository(student.base) and student.base.rpartition("/")[2].lower() == student.name
    ]
    return table(["student", "parameters", "context", "licence", "GSM8K (%)", "MATH (%)"], rows)


def _number(row: Row | None, name: str, digits: int) -> str:
    return "" if row is None or row[name] is None else f"{row[name]:,.{digits}f}"


def _share(row: Row) -> str:
    return "" if row["share_of_floor"] is None else f"{100 * row['share_of_floor']:.0f}%"


def _peers(row: Row, names: Sequence[str]) -> list[str]:
    return [f"{row['peers'][name]:,.1f}" if name in row["peers"] else "" for name in names]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _of(row: Row) -> str:
    return f"{row['accepted']:,} of {row['count']:,}"


TABLES: dict[str, Callable[[Read], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        pico_seconds,
        pico_scores,
        small_scores,
        serve_v3,
        serve_students,
        serve_pico,
        generation,
        drafts,
        client,
        kernels_dense,
        kernels_experts,
        kernels_attention,
        exchange,
        serving_ranks,
        pipelines,
        placement,
        memory,
        graders,
        programs,
        decontamination,
        curation,
        ledger,
        zoo,
    )
}
