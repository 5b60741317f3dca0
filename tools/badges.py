"""Point every badge and install cell at one repository: ``python tools/badges.py owner/name``."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

from translation import english_cells, hash_of

ROOT = Path(__file__).parent.parent
PLACES = (
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "docs/commands.md",
    "notebooks/*.ipynb",
    "README.ko.md",
    "notebooks/ko/*.ipynb",
    "translations/ko/*.md",
    "mkdocs.yml",
    "llama_sft_helpers/*.py",
)


def current_repository() -> str:
    """``owner/name`` as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def restamp(new: str) -> list[Path]:
    """Replace the repository's name wherever a file names it; returns the files that changed.

    Raises:
        ValueError: ``new`` is not of the form ``owner/name``.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise ValueError(f"REPO={new!r}: expected owner/name, for example llama-sft/llama-sft-notebooks.")
    old = re.escape(current_repository())
    named = re.compile(
        rf"(?<=github\.com/){old}\b|(?<=/github/){old}\b"
    )  # an address, and nothing that looks alike
    changed = []
    for path in (path for pattern in PLACES for path in sorted(ROOT.glob(pattern))):
        text = path.read_text(encoding="utf-8")
        if (stamped := named.sub(new, text)) != text:
            before = english_cells(path)
            path.write_text(stamped, encoding="utf-8")
            _carry_hashes(path, before)
            changed.append(path)
    return changed


def _carry_hashes(path: Path, before: dict[str, str]) -> None:
    """A translation that was current stays current: a repository's name needs none."""
    overlay = ROOT / "translations" / "ko" / f"{path.stem}.md"
    if path.parent in (ROOT, ROOT / "notebooks") and overlay.is_file():
        text, after = overlay.read_text(encoding="utf-8"), english_cells(path)
        for cell, english in before.items():
            old, new = f"cell {cell} {hash_of(english)} -->", f"cell {cell} {hash_of(after[cell])} -->"
            text = text.replace(old, new)
        overlay.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        for path in restamp(sys.argv[1] if len(sys.argv) > 1 else ""):
            print(path.relative_to(ROOT))
    except ValueError as error:
        sys.exit(str(error))
