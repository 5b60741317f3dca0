"""Counts of the doctor's tests and of the drills: printed at the end, and written for docs/failures.md.

``SFT_DRILLS_JSON=docs/failures.json pytest ...`` merges this run's counts into that file.
"""

import importlib.metadata
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "huggingface_hub")
_counts: dict[str, dict[str, Counter]] = {"failures": defaultdict(Counter), "drills": defaultdict(Counter)}


def record(section: str, name: str, **counts: int) -> None:
    """Add to the counts of one failure or drill."""
    _counts[section][name].update(counts)


@pytest.fixture(scope="session", autouse=True)
def ledger(request):
    """Prints what this session counted, and writes it if ``$SFT_DRILLS_JSON`` names a file."""
    yield
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    drills = _counts["drills"]
    if terminal and drills:
        terminal.write_line("")
        for name, counts in drills.items():
            terminal.write_line(f"{name}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    if path := os.environ.get("SFT_DRILLS_JSON"):
        _write(Path(path))


def _write(path: Path) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for section, names in _counts.items():
        known.setdefault(section, {}).update({name: dict(counts) for name, counts in names.items()})
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        known["card"] = torch.cuda.get_device_name()
    known["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
