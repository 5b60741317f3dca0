"""Write docs/failures.md from the doctor's table and the counts that its tests and the drills recorded.

``python tools/failures.py --record`` runs them first (minutes) and keeps their counts in docs/failures.json;
``--check`` only says whether the page is up to date. Failures that need a GPU are counted where there is one:
``SFT_DRILLS_JSON=docs/failures_gpu.json pytest -m gpu tests/gpu/test_doctor_gpu.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llama_sft_helpers.doctor import TABLE, Failure

ROOT = Path(__file__).parent.parent
COUNTS = ROOT / "docs" / "failures.json"
ON_GPU = ROOT / "docs" / "failures_gpu.json"
PAGE = ROOT / "docs" / "failures.md"
PAGE_TEST = "tests/doctor/test_doctor.py::test_the_failure_page_is_that_of_the_table_and_the_counts"
TESTS = ("tests/doctor/test_doctor.py", "tests/doctor/test_drills.py", "tests/test_security.py")

_HEAD = """<!-- Written by tools/failures.py from the doctor's table and docs/failures.json; do not edit. -->
# When it breaks

`%load_ext llama_sft_helpers` shows the cause and the next action under every traceback listed here, and
`llama-sft run` prints them too. The traceback stays. In code: `doctor.explain(exception)`.

{total}

"Provoked" counts real exceptions, raised by the real libraries in a test; "explained" those for which the
doctor named this entry. An unknown exception passes through untouched.
"""
_DRILLS = """
## Drills: what survives

| drill | provoked | survived | further counts |
|---|---:|---:|---|
"""
# What stands in the page for the {...} of the table's texts.
_FILL = {
    "package": "a package", "on_disk": "a newer one", "loaded": "(older)", "found": "older",
    "advice": "The doctor names the new one.", "owner": "SFTConfig", "old": "max_seq_length",
    "torch": "as installed", "place": "", "repo": "the model", "page": "the model's page",
    "wanted": "some GiB", "change": "Take less.", "plan": "The doctor names the plan's largest item.",
    "path": "of that name", "cwd": "the notebook's folder", "near": "The doctor names the nearest there is.",
    "dtypes": "Float and Half", "targets": "c_attn", "column": "instruction", "rows": "40",
    "line": "assert after < before",
}  # fmt: skip
_RERUN = (
    "\nMeasured with {versions}; again with `python tools/failures.py --record` (as root: small disks).\n"
)


def record() -> int:
    """Run the doctor's tests and the drills, and keep their counts if all passed; pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        environment = os.environ | {"SFT_DRILLS_JSON": str(counts)}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not browser and not gpu", *TESTS]
        command += ["--deselect", PAGE_TEST]  # it compares the page with the counts that are about to come
        exit_code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode  # noqa: S603
        if exit_code == 0:
            COUNTS.write_bytes(counts.read_bytes())
    return exit_code


def page(counts: dict[str, Any], on_gpu: dict[str, Any]) -> str:
    """The page as Markdown, of the counts on a CPU and of those on a GPU."""
    failures, drills = {**on_gpu["failures"], **counts["failures"]}, counts["drills"]
    parts = [_HEAD.format(total=_totals(failures, drills))]
    section = ""
    for failure in TABLE:
        if failure.section != section:
            section = failure.section
            parts.append(f"\n## {section}\n\n| failure | cause | next action | provoked | explained |")
            parts.append("|---|---|---|---:|---:|")
        parts.append(_row(failure, failures.get(failure.key, {})))
    parts.append(_DRILLS.rstrip("\n"))
    parts += [_drill_row(name, found) for name, found in sorted(drills.items())]
    names = ", ".join(sorted(set(on_gpu["failures"]) - set(counts["failures"])))
    versions, gpu_versions = (
        ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        for found in (counts, on_gpu)
    )
    parts.append(_RERUN.format(versions=versions))
    parts.append(f"On one {on_gpu['card']} ({names}): {gpu_versions}.\n")
    return "\n".join(parts)


def _totals(failures: dict[str, Any], drills: dict[str, Any]) -> str:
    provoked = sum(found["provoked"] for found in failures.values())
    explained = sum(found.get("explained", 0) for found in failures.values())
    lost = sum(found.get("lost checkpoints", 0) for found in drills.values())
    leaked = sum(found.get("tokens leaked", 0) for found in drills.values())
    wrong = sum(found.get("silently wrong", 0) for found in drills.values())
    tried = sum(found.get("provoked", 0) for found in drills.values())
    survived = sum(found.get("survived", 0) for found in drills.values())
    return (
        "| | provoked | explained or survived |\n|---|---:|---:|\n"
        f"| failures of {len(failures)} of {len(TABLE)} kinds | {provoked} | {explained} |\n"
        f"| drills of {len(drills)} kinds | {tried:,} | {survived:,} |\n\n"
        f"Lost checkpoints: {lost}. Damaged files used without notice: {wrong}. Tokens leaked: {leaked}."
    )


def _row(failure: Failure, found: dict[str, int]) -> str:
    cause, fix = failure.cause, failure.fix
    for name, text in _FILL.items():
        cause, fix = cause.replace(f"{{{name}}}", text), fix.replace(f"{{{name}}}", text)
    cells = [
        f"[{failure.title}]({failure.link})",
        cause,
        fix,
        str(found.get("provoked", "needs a GPU")),
        str(found.get("explained", "")),
    ]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _drill_row(name: str, found: dict[str, int]) -> str:
    further = ", ".join(
        f"{count} {what}" for what, count in found.items() if what not in ("provoked", "survived")
    )
    return f"| {name} | {found.get('provoked', 0):,} | {found.get('survived', 0):,} | {further} |"


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="run the tests and drills first")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    if arguments.record and record() != 0:
        print("A drill failed; the page was not written.", file=sys.stderr)
        return 1
    text = page(*(json.loads(path.read_text(encoding="utf-8")) for path in (COUNTS, ON_GPU)))
    if arguments.check:
        return 0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
