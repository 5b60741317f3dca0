"""Format, check, tokenize and measure Alpaca's 52,000 rows with Llama 3's own tokenizer, on CPUs.

The shipped rows are repeated to Alpaca's size, each with its own number in the instruction so that none is a
duplicate. Run: ``python benchmarks/tokenize_52k.py`` (writes ``results/tokenize_52k.json``). Nothing is read
from a cache, and the peak memory is that of this process, imports and tokenizer included.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import datasets
import psutil
from llama3_tokenizer import build_llama3_tokenizer
from report import card, cores, peak_gib, source, write

from llama_sft_helpers import data
from llama_sft_helpers.profiles import read_profile

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "llama_sft_helpers" / "datasets" / "alpaca_mini.jsonl"
LIMIT_SECONDS = 60.0
LIMIT_GIB = 2.0


def write_rows(path: Path, count: int) -> None:
    rows = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            row = dict(rows[number % len(rows)])
            row["instruction"] += f" ({number})"
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(path: Path, cache: Path, max_length: int) -> dict[str, object]:
    seconds: dict[str, float] = {}

    def timed(name, call):
        start = time.perf_counter()
        result = call()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    tokenizer = timed("build the tokenizer", build_llama3_tokenizer)
    rows = timed(
        "load",
        lambda: datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache)),
    )
    formatted = timed(
        "format",
        lambda: rows.map(
            data.to_prompt_completion, with_indices=True, remove_columns=rows.column_names, desc="Formatting"
        ),
    )
    counted = timed(
        "tokenize",
        lambda: formatted.map(
            data.count_tokens, batched=True, fn_kwargs={"tokenizer": tokenizer}, desc="Counting tokens"
        ),
    )
    lengths = counted["tokens"][:]
    table = timed("measure", lambda: data.summarize_lengths(lengths))
    plan = timed("plan packing", lambda: data.plan_packing(lengths, batch_size=8, max_length=4096))
    checked = timed("check all rows", lambda: data.summarize_rows(rows, tokenizer, max_length))
    return {
        "rows": len(counted),
        "tokens": sum(lengths),
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 2),
        "tokens_per_second": round(sum(lengths) / seconds["tokenize"]),
        "peak_memory_gib": round(peak_gib(), 2),
        "recommended_max_length": int(table.index[table["recommended"]][0]),
        "rows_with_a_problem": int(checked["rows"].sum()),
        "padding_share": plan["padding_share"].round(4).to_dict(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tokenize_52k.json")
    options = parser.parse_args()
    about = source(card(), ("datasets", "tokenizers", "transformers", "pyarrow", "llama-models"))
    about |= {"cpus": cores(), "load_average_before": round(psutil.getloadavg()[0], 2)}
    about |= {"machine": platform.machine(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        write_rows(path, options.rows)
        max_length = read_profile("colab-a100").max_length
        result = {**about, **measure(path, Path(scratch) / "cache", max_length)}
    result["limits"] = {"seconds": LIMIT_SECONDS, "gib": LIMIT_GIB}
    write(options.out, result)
    print(json.dumps(result, indent=1))
    return int(result["total_seconds"] > LIMIT_SECONDS or result["peak_memory_gib"] > LIMIT_GIB)


if __name__ == "__main__":
    sys.exit(main())
