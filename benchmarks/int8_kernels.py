"""Products of int8 codes and what makes the codes, on a GPU: each kernel against the truth, then its time.

    python benchmarks/int8_kernels.py --out benchmarks/results/int8_kernels_h200.json

Each variant has a process of its own, so that one that does not compile, or hangs, costs only itself. All
compile and are checked at once; then each is timed alone. Shapes are those of Llama 3 8B's linear layers,
forward and for the input's gradient; each time is a median over replays of a CUDA graph that goes around
three sets of inputs. ``--tiny`` tries the script on a CPU, and with ``TRITON_INTERPRET=1`` Triton's kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import card, source, write

ROWS = 4096, 6480, 8192
TILES: dict[str, dict[str, Any]] = {
    "plain 128x128x128, 3 stages": {},
    "gluon 128x128x128, 6 stages": {"stages": 6, "group": 16},
}
VARIANTS = ["cuBLAS bf16", "torch._int_mm", "the package", *TILES, "codes of rows", "transposing"]
# of a decoder layer: results x summed, and how many products have that shape, forward and for the gradient
FORWARD = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
BACKWARD = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1}
SHAPES = [*FORWARD, (4096, 1024)]
LAYERS = 32
RANK = 32  # LoRA's 16 and as many outlier columns
EDGES = (1, 4096, 4096), (127, 1024, 4096), (129, 4096, 1024), (200, 1000, 1040), (6480, 4096, 14336)
PLAIN = ["a", "b", "row_scale", "column_scale"]
TINY_EDGES = (1, 64, 96), (70, 40, 64)


def inputs(rows: int, columns: int, summed: int, device: str) -> dict[str, Any]:
    """Random codes and scales of one product, and what may be added to it."""
    import torch

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float16 if device == "cpu" else torch.bfloat16)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).mul_(32).round_().clamp_(-127, 127).to(torch.int8)

    return {
        "a": codes(rows, summed), "b": codes(columns, summed),
        "row_scale": torch.rand(rows, device=device) / 100,
        "column_scale": torch.rand(columns, device=device) / 100,
        "add": half(rows, columns), "thin": (half(rows, RANK), half(columns, RANK)),
    }  # fmt: skip


def product_of(variant: str, device: str) -> Callable[..., Any]:
    """A function of ``inputs``, or of a part of it."""
    import torch

    from llama_sft_helpers.speed import int8_kernels

    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    if variant == "torch._int_mm":
        return lambda a, b, **_: torch._int_mm(a, b.T)
    if variant == "cuBLAS bf16":
        return lambda a, b, **_: a @ b.T
    if variant == "the package":
        return lambda a, b, row_scale, **beside: int8_kernels.int8_matmul(
            a, b, row_scale, **beside, dtype=dtype
        )
    from llama_sft_helpers.speed import triton_int8

    small = {"rows": 32, "columns": 32, "depth": 32} if device == "cpu" else {}
    tiles = triton_int8.Tiles(**TILES[variant] | small)
    if variant.startswith("gluon"):
        from llama_sft_helpers.speed import gluon_int8

        return lambda a, b, row_scale, column_scale=None, thin=None: gluon_int8.int8_matmul(
            a, b, row_scale, column_scale, dtype, thin, tiles
        )
    return lambda a, b, row_scale, column_scale=None, add=None, thin=None: triton_int8.plain_matmul(
        a, b, row_scale, column_scale, add, dtype, thin, tiles
    )


def added_by(variant: str) -> list[str]:
    """What a variant can add to its product."""
    if variant in {"cuBLAS bf16", "torch._int_mm"}:
        return []
    return ["thin"] if variant.startswith("gluon") else ["add", "thin"]


def check(variant: str, product: Callable[..., Any], device: str) -> list[dict[str, Any]]:
    """Results at edge sizes against float64, which holds every sum of products of codes exactly."""
    import torch

    results = []
    for rows, columns, summed in TINY_EDGES if device == "cpu" else EDGES:
        given = inputs(rows, columns, summed, device)
        a, b, row, column = (given[name] for name in ("a", "b", "row_scale", "column_scale"))
        exact = a.double() @ b.double().T
        assert exact[-1, -1].item() == (a[-1].long() * b[-1].long()).sum().item()
        poison = torch.full((rows, columns), float("nan"), device=device, dtype=given["add"].dtype)
        del poison  # the result likely lies where it was, so that an element left out shows
        sums = product(a=a, b=b, row_scale=torch.full_like(row, 2**-8))
        wrong = (sums != (exact * 2**-8).float().to(sums.dtype)).sum().item()
        parts = [*PLAIN, *added_by(variant)]
        got = product(**{key: given[key] for key in parts}).double()
        truth = exact * row.double()[:, None] * column.double()
        truth += given["thin"][0].double() @ given["thin"][1].double().T
        truth += given["add"].double() if "add" in parts else 0
        error = ((got - truth).norm() / truth.norm()).item()
        largest = ((got - truth).abs() / (truth.abs() + 1e-3 * truth.abs().max())).max().item()
        shape = f"{rows} x {columns} x {summed}"
        good = wrong == 0 and error < 3e-3 and largest < 8e-3
        results.append(
            {"shape": shape, "wrong_sums": wrong, "error": error, "largest": largest, "good": good}
        )
    return results


def compile_all(variant: str, product: Callable[..., Any], device: str) -> None:
    """Compile what will be timed, now, while other variants compile."""
    given = inputs(*(TINY_EDGES if device == "cpu" else EDGES)[0], device)
    for added in ([], *([name] for name in added_by(variant))):
        product(**{key: given[key] for key in [*PLAIN, *added]})


def milliseconds(calls: list[Callable[[], Any]], device: str) -> float:
    """Median time of one call, in ms; the calls take different inputs, so that the cache holds none."""
    import torch

    for call in calls:
        call()
    if device == "cpu":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls) * 1e3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * 3:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    replays = 1
    for turn in range(6):  # the first one warms up and says how often to replay
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / replays / (3 * len(calls)))
        if turn == 0:
            replays = max(1, int(20 / (times[0] * 3 * len(calls))))
    return statistics.median(times[1:])


def time_products(variant: str, product: Callable[..., Any], device: str, result: dict[str, Any]) -> None:
    """Every shape at every number of rows; at one number also with what is added. ``result`` grows."""
    tiny = device == "cpu"
    cut = 64 if tiny else 1
    result["ms"] = {}
    for rows in (16, 24) if tiny else ROWS:
        for columns, summed in SHAPES:
            sets = [inputs(rows, columns // cut, summed // cut, device) for _ in range(1 if tiny else 3)]
            parts = {"": PLAIN}
            if variant == "cuBLAS bf16":
                sets = [given | {name: given[name].to(given["add"].dtype) for name in "ab"} for given in sets]
            if rows in {6480, 24}:
                parts |= {f" {name}": [*PLAIN, name] for name in added_by(variant)}
            for name, part in parts.items():
                calls = [functools.partial(product, **{key: given[key] for key in part}) for given in sets]
                key = f"{rows} x {columns} x {summed}{name}"
                result["ms"][key] = round(milliseconds(calls, device), 5)
    given = inputs(32, 1024, 64, device)
    if variant == "cuBLAS bf16":
        given |= {name: given[name].to(given["add"].dtype) for name in "ab"}
    call = functools.partial(product, **{key: given[key] for key in PLAIN})
    result["host_microseconds"] = round(host_microseconds(call, device), 1)


def host_microseconds(call: Callable[[], Any], device: str) -> float:
    """What a call keeps Python busy: many small ones, not waited for."""
    import torch

    count = 3 if device == "cpu" else 300
    for _ in range(3):
        call()
    started = time.perf_counter()
    for _ in range(count):
        call()
    seconds = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.synchronize()
    return seconds / count * 1e6


def row_calls(rows: int, columns: int, device: str) -> dict[str, tuple[list[Callable[[], Any]], int]]:
    """For each function: calls on different inputs, and the bytes it must move for a value."""
    import torch

    from llama_sft_helpers.speed import int8_kernels

    half = torch.float32 if device == "cpu" else torch.bfloat16
    xs = [torch.randn(rows, columns, device=device).to(half) for _ in range(6)]
    keep = torch.ones(columns, device=device)
    quantize = [functools.partial(int8_kernels.quantize_rows, x, keep) for x in xs]
    return {"copy": ([x.clone for x in xs], 4), "quantize": (quantize, 3)}


def time_rows(device: str, result: dict[str, Any]) -> None:
    """Codes of rows beside a copy of the rows."""
    result["ms"], result["bytes"] = {}, {}
    for rows in (16,) if device == "cpu" else ROWS:
        for columns in (64,) if device == "cpu" else (1024, 4096, 14336):
            for kind, (calls, size) in row_calls(rows, columns, device).items():
                key = f"{kind} {rows} x {columns}"
                result["ms"][key] = round(milliseconds(calls, device), 5)
                result["bytes"][key] = size * rows * columns


def check_rows(device: str) -> list[dict[str, Any]]:
    """Codes and scales must be the nearest to the rows' values in float64."""
    import torch

    from llama_sft_helpers.speed import int8_kernels

    results = []
    half = torch.float32 if device == "cpu" else torch.bfloat16
    for rows, columns in ((1, 64), (37, 200)) if device == "cpu" else ((1, 4096), (333, 14336), (97, 1000)):
        x, keep = torch.randn(rows, columns, device=device).to(half), torch.rand(columns, device=device)
        x[rows // 2] = 0
        codes, scales = int8_kernels.quantize_rows(x, keep)
        steps = (codes - x.double() * keep.double() / scales.double().clamp(min=1e-30)[:, None]).abs()
        good = bool((steps <= 0.501).all()) and not codes[rows // 2].any()
        found = {"shape": f"quantize {rows} x {columns}", "error": steps.max().item(), "good": good}
        results.append(found)
    return results


def check_transposing(device: str) -> list[dict[str, Any]]:
    import torch

    from llama_sft_helpers.speed import int8_kernels

    results = []
    for shape in ((40, 24), (7, 5)) if device == "cpu" else ((14336, 4096), (1000, 4), (7, 5)):
        codes = torch.randint(-128, 128, shape, device=device, dtype=torch.int8)
        good = int8_kernels.transpose_codes(codes).equal(codes.T)
        results.append({"shape": f"{shape[0]} x {shape[1]}", "good": good})
    return results


def time_transposing(device: str, result: dict[str, Any]) -> None:
    import torch

    from llama_sft_helpers.speed import int8_kernels

    result["ms"] = {}
    for columns, summed in FORWARD:
        cut = 64 if device == "cpu" else 1
        shape = columns // cut, summed // cut
        sets = [torch.randint(-128, 128, shape, device=device, dtype=torch.int8) for _ in range(6)]
        calls = [lambda codes=codes: int8_kernels.transpose_codes(codes) for codes in sets]
        result["ms"][f"{columns} x {summed}"] = round(milliseconds(calls, device), 5)
    result["model_ms"] = round(
        LAYERS * sum(count * result["ms"][f"{n} x {k}"] for (n, k), count in FORWARD.items()), 3
    )


def work(variant: str, out: Path, device: str) -> None:
    """What a variant's process does: check, wait for its turn, time; the result file grows."""
    import torch

    torch.manual_seed(0)
    result: dict[str, Any] = {"variant": variant}
    product = None if variant in {"codes of rows", "transposing"} else product_of(variant, device)
    if product is None:
        result["checks"] = check_rows(device) if variant == "codes of rows" else check_transposing(device)
    elif added_by(variant):
        result["checks"] = check(variant, product, device)
        compile_all(variant, product, device)
    write(out, result)
    if device == "cuda":
        torch.cuda.empty_cache()
    out.with_suffix(".ready").touch()
    while not out.with_suffix(".turn").exists():
        time.sleep(0.02)
    if product is not None:
        time_products(variant, product, device, result)
    elif variant == "codes of rows":
        time_rows(device, result)
    else:
        time_transposing(device, result)
    write(out, result)


def step_ms(result: dict[str, Any], rows: int, kind: str = "") -> float | None:
    """Time of all frozen products of one step, forward and for the input's gradient."""
    times = result.get("ms", {})
    shapes = [*FORWARD.items(), *BACKWARD.items()]
    keys = [(f"{rows} x {n} x {k}{kind}", count) for (n, k), count in shapes]
    if any(key not in times for key, _ in keys):
        return None
    return round(LAYERS * sum(count * times[key] for key, count in keys), 2)


def add_step(result: dict[str, Any]) -> None:
    """Add the time of a step and its rate to a variant of the product."""
    operations = 2 * 2 * LAYERS * sum(count * n * k for (n, k), count in FORWARD.items())
    for rows in ROWS:
        if ms := step_ms(result, rows):
            result.setdefault("step_ms", {})[str(rows)] = ms
            result.setdefault("tera_operations_per_second", {})[str(rows)] = round(
                operations * rows / ms / 1e9
            )
    for kind in (" add", " thin"):
        if ms := step_ms(result, 6480, kind):
            result["step_ms"][f"6480{kind}"] = ms


def show(result: dict[str, Any]) -> None:
    bad = [check["shape"] for check in result.get("checks", []) if not check["good"]]
    state = f"WRONG at {'; '.join(bad)}" if bad else "right" if "checks" in result else "not checked"
    parts = [f"{result['variant']:>56}", state]
    rates = result.get("tera_operations_per_second", {})
    parts += [
        f"{rows}: {ms} ms" + (f" {rates[rows]} TOP/s" if rows in rates else "")
        for rows, ms in result.get("step_ms", {}).items()
    ]
    parts += [f"{name} {result[name]}" for name in ("host_microseconds", "model_ms") if name in result]
    parts += [f"ERROR {result['error'][-300:]}"] if "error" in result else []
    print("  ".join(parts), flush=True)
    for key, size in result.get("bytes", {}).items():
        if " 6480 " in key:
            ms = result["ms"][key]
            print(f"{key:>56}  {ms * 1e3:7.1f} us  {size / ms / 1e9:5.2f} TB/s")


def start_all(variants: list[str], folder: Path, args: argparse.Namespace) -> list[tuple[str, Path, Any]]:
    """A process for each variant compiles and checks; back when all are ready or their time is over."""
    jobs = []
    for number, variant in enumerate(variants):
        out = folder / f"{number}.json"
        command = [sys.executable, __file__, "--variant", variant, "--out", str(out)]
        with out.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(command + ["--tiny"] * args.tiny, stdout=log, stderr=subprocess.STDOUT)
        jobs.append((variant, out, process))
    until = time.monotonic() + args.compile_seconds
    while time.monotonic() < until and any(
        process.poll() is None and not out.with_suffix(".ready").exists() for _, out, process in jobs
    ):
        time.sleep(0.1)
    for _, out, process in jobs:  # one that is still compiling would disturb the others' times
        if not out.with_suffix(".ready").exists():
            process.kill()
    return jobs


def run_all(variants: list[str], args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Each variant has its turn alone, for a limited time; the results are written after each."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for variant, out, process in start_all(variants, Path(folder), args):
            out.with_suffix(".turn").touch()
            reason = ""
            try:
                process.wait(args.turn_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                reason = f"more than {args.turn_seconds} s; "
            result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"variant": variant}
            if process.wait():
                log = out.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
                result["error"] = reason + log[-1500:]
            add_step(result)
            show(result)
            results.append(result)
            save(results, args, device)
    return results


def save(results: list[dict[str, Any]], args: argparse.Namespace, device: str) -> None:
    about = source(os.environ.get("CARD") or device, ("torch", "triton"))
    about["command"] = about["command"].replace(args.out, f"benchmarks/results/{Path(args.out).name}")
    write(args.out, {**about, "layers": LAYERS, "rank_of_thin": RANK, "variants": results})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--only", default="", help="variants separated by ';'; all if left out")
    parser.add_argument("--compile-seconds", type=float, default=75.0)
    parser.add_argument("--turn-seconds", type=float, default=25.0)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU, to try the script")
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    if args.variant:
        work(args.variant, Path(args.out), device)
        return
    variants = [name.strip() for name in args.only.split(";") if name.strip()] or VARIANTS
    if unknown := sorted(set(variants) - set(VARIANTS)):
        parser.error(f"no variant {unknown}; there are {VARIANTS}")
    os.environ["CARD"] = card()
    run_all(variants, args, device)


if __name__ == "__main__":
    main()
