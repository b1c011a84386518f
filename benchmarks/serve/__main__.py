"""Runs every engine in a process of its own, prints the table and writes the result."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import serve
from benchmarks.device import device_name, driver_version, write_result
from benchmarks.generation import machine_speed
from benchmarks.serve import pico, real, students, v3
from distill.cores import num_cores

PACKAGES = ("torch", "transformers", "vllm")


def main() -> None:
    show = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.serve", description=serve.__doc__, formatter_class=show)
    parser.add_argument("--engines", default="ours,invariant,vllm,transformers")
    parser.add_argument("--moe-layers", type=int, default=2, help="of the slice")
    parser.add_argument("--batches", default="1,8,32,128,256", help="of the slice")
    parser.add_argument("--folder", type=Path, help="of the slice: keep its weights here, or use them")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<device>")
    parser.add_argument("--dry-run", action="store_true", help="both scenarios at toy sizes, on the CPU")
    parser.add_argument("--only", choices=("students",), help="measure this part alone")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--in-flight", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scenario", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_flight:
        folder, scale = students.scenarios()[args.scenario], students.scale(toy=args.dry_run)
        for row in students.ENGINES[args.engine](folder, scale, args.in_flight):
            print("RESULT", json.dumps(row), flush=True)
    elif args.engine:
        print("RESULT", json.dumps(_one(args)), flush=True)
    else:
        if args.only is None:
            _compare(args)
        if args.dry_run or torch.cuda.is_available():
            _compare_students(args)


def _one(args: argparse.Namespace) -> dict[str, Any]:
    if args.scenario in pico.MODELS:
        return pico.ENGINES[args.engine](pico.MODELS[args.scenario], pico.scale(toy=args.dry_run))
    if args.scenario in (published := real.scenarios()):
        return real.ENGINES[args.engine](*published[args.scenario], real.scale(toy=args.dry_run))
    return v3.ENGINES[args.engine](args.folder, _slice(args))


def _slice(args: argparse.Namespace) -> v3.Scale:
    batches = [int(batch) for batch in args.batches.split(",")]
    return v3.scale(moe_layers=args.moe_layers, batches=batches, toy=args.dry_run)


def _compare(args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available() and not args.dry_run
    device = torch.device("cuda" if on_gpu else "cpu")
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    details: dict[str, Any] = {}
    if on_gpu or args.dry_run:
        rows += _measure_slice(args, device, details, missing)
    if not on_gpu:
        rows += _measure_bundled(args, details, missing)
        rows += _measure_published(args, missing)
    for row in rows:
        share = f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else "-"
        step = f"{row['step_ms']:.3f} ms" if row["step_ms"] else "-"
        cells = f"{row['engine']:14}{row['scenario']:24}{row['batch']:>5}{step:>14}"
        print(f"{cells}{row['tokens_per_s']:>12.0f}/s {share:>5}")
    result = _head(device) | {"left_out": missing, **details, "rows": rows}
    print("written:", write_result("serve", result, device=device_name(device), folder=args.out))


def _compare_students(args: argparse.Namespace) -> None:
    """Every row is written as soon as it is there: a run that is ended keeps what it has."""
    device = torch.device("cpu" if args.dry_run else "cuda")
    rows: list[dict[str, Any]] = []
    missing: list[str] = [f"{name}: not in models/ or $POTSTILL_MODELS" for name in students.NAMES]
    missing = [name for name in missing if name.partition(":")[0] not in students.scenarios()]
    result = _head(device) | {"left_out": missing, "rows": rows}

    def write() -> Path:
        return write_result("serve-students", result, device=device_name(device), folder=args.out)

    try:
        students.scale(toy=args.dry_run).questions(1)
    except OSError as exc:
        missing.append(str(exc))
        print("written:", write())
        return
    for model in students.scenarios():
        for engine in (name for name in args.engines.split(",") if name in students.ENGINES):
            for in_flight in students.scale(toy=args.dry_run).in_flight:
                print(f"{model}, {engine}:", flush=True)
                command = [f"--engine={engine}", f"--scenario={model}", f"--in-flight={in_flight}"]
                command += ["--dry-run"] if args.dry_run else []
                before = len(rows)
                for row in _results([sys.executable, "-m", "benchmarks.serve", *command]):
                    rows.append({"engine": engine, "model": model, **row})
                    write()
                if len(rows) - before < len(students.KINDS):
                    missing.append(f"{model}: {engine} at {in_flight}")
    print("written:", write())


def _head(device: torch.device) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]),
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _measure_slice(
    args: argparse.Namespace, device: torch.device, details: dict[str, Any], missing: list[str]
) -> list[dict[str, Any]]:
    from benchmarks.kernels.ceilings import measure

    ceilings, scale = measure(device), _slice(args)
    bytes_per_s = max(ceilings.copy_bytes_per_s, ceilings.read_bytes_per_s)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = args.folder or Path(scratch) / "v3-slice"
        if not (folder / "config.json").exists():
            started = time.perf_counter()
            v3.write_random(folder, scale.config, device)
            print(f"weights written in {time.perf_counter() - started:.0f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the engines' processes
        results = _measure(args, "v3", folder, missing)
    details |= {"config": scale.config.to_json(), "context": scale.context, "bytes_per_s": bytes_per_s}
    return list(v3.rows(scale, results, bytes_per_s))


def _measure_bundled(args: argparse.Namespace, details: dict[str, Any], missing: list[str]) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(num_cores())
    speed = details["flop_per_s"], details["bytes_per_s"] = machine_speed()
    details["load_average"] = [round(value, 1) for value in os.getloadavg()]
    for model in pico.MODELS:
        yield from pico.rows(model, pico.scale(toy=args.dry_run), _measure(args, model, None, missing), *speed)


def _measure_published(args: argparse.Namespace, missing: list[str]) -> Iterator[dict[str, Any]]:
    found = real.scenarios()
    if not found:
        missing.append("published models: none in models/ or $POTSTILL_MODELS (potstill models fetch small)")
    for scenario in found:
        results = _measure(args, scenario, None, missing, limit_s=real.LIMIT_S)
        yield from real.rows(scenario, real.scale(toy=args.dry_run), results)


def _measure(
    args: argparse.Namespace, scenario: str, folder: Path | None, missing: list[str], *, limit_s: float | None = None
) -> dict[str, Any]:
    """Results by engine; those that fail, or take longer than `limit_s`, are named in `missing`."""
    given = [f"--moe-layers={args.moe_layers}", f"--batches={args.batches}", f"--scenario={scenario}"]
    given += [f"--folder={folder}"] if folder else []
    given += ["--dry-run"] if args.dry_run else []
    found = {}
    able = v3.ENGINES if scenario == "v3" else pico.ENGINES if scenario in pico.MODELS else real.ENGINES
    for name in args.engines.split(","):
        if name not in able and name in pico.ENGINES:  # not every scenario has every engine
            continue
        print(f"{scenario}, {name}:", flush=True)
        started = time.monotonic()
        result = _run([sys.executable, "-m", "benchmarks.serve", f"--engine={name}", *given], limit_s)
        if result is None:
            late = limit_s is not None and time.monotonic() - started > limit_s
            missing.append(f"{scenario}: {name}" + (f" (not done within {limit_s:.0f} s)" if late else ""))
        else:
            found[name] = result
    return found


def _run(command: list[str], limit_s: float | None) -> dict[str, Any] | None:
    """The engine's times; None where it failed, whose last words are on the screen."""
    return next(iter(list(_results(command, limit_s))), None)


def _results(command: list[str], limit_s: float | None = None) -> Iterator[dict[str, Any]]:
    """What a process of this program tells, as it tells it; the rest of what it says is on the screen.

    It is ended after `limit_s`, where there is one.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        clock = None if limit_s is None else threading.Timer(limit_s, process.kill)
        if clock is not None:
            clock.start()
        for line in process.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
            else:
                print(line, end="", flush=True)
        if clock is not None:
            clock.cancel()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
