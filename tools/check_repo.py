"""Check the repository's own files: ``python tools/check_repo.py``, which ``make lint`` runs.

Each rule is a function that yields ``path:line: what, and what to do``; in a notebook the place is a cell.
"""

from __future__ import annotations

import sys
from pathlib import Path

import check_files
import check_notebooks
import check_package
import translation
from repository import Repository

RULES = (*check_package.RULES, *check_notebooks.RULES, *check_files.RULES, *translation.RULES)


def main() -> int:
    """Print what the rules find; 1 if they find anything."""
    repo = Repository(Path(__file__).resolve().parent.parent)
    found = [message for rule in RULES for message in rule(repo)]
    print("\n".join(found) or f"{len(RULES)} rules on the repository's files: all kept.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
