"""The Korean edition: ``python tools/translation.py --build``, ``--check``, ``--stamp 03 [CELL ...]``.

An overlay, ``translations/ko/NN_word.md``, holds the text of a notebook's markdown cells in Korean, each
under a line ``<!-- cell ID HASH -->`` with the hash of the English text that it translates. The build copies
all else of the notebook to ``notebooks/ko/``, so code and outputs cannot differ. ``README.md`` is treated
alike: its sections are its cells.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from repository import Repository
from translation_parts import CODE, glossary_findings, part_findings

ROOT = Path(__file__).resolve().parent.parent
# Not in the edition until their overlays are complete; empty it then.
WAITING: tuple[str, ...] = ()
_MARK = re.compile(r"(?m)^<!-- cell (\S+) ([0-9a-f]{12}) -->\n")
_TARGET = re.compile(r'(\]\(|(?:src|href)=")([^)"#\s]*)(#[^)"\s]*)?')
_COLAB = re.compile(r"(https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/main/)(.+)")


class Document(NamedTuple):
    """A file of the English edition, its translation, and the file that is built of both."""

    english: Path
    overlay: Path
    korean: Path


class Entry(NamedTuple):
    """A cell's translation."""

    line: int  # in the overlay
    cell: str
    hash: str  # of the English text that it translates
    text: str


def documents(repo: Repository) -> list[Document]:
    """What the Korean edition has."""
    overlays, readme = repo.root / "translations" / "ko", repo.root / "README.md"
    found = [
        Document(path, overlays / f"{path.stem}.md", path.parent / "ko" / path.name)
        for path in repo.notebooks
        if path.stem not in WAITING
    ]
    if readme.is_file() and readme.stem not in WAITING:
        found.append(Document(readme, overlays / "README.md", repo.root / "README.ko.md"))
    return found


def hash_of(text: str) -> str:
    """What an entry says of the English text that it translates."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def english_cells(path: Path) -> dict[str, str]:
    """Id -> text of a notebook's markdown cells; of another file its sections, by their headings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"}
    sections = [section.strip("\n") for section in re.split(r"(?m)^(?=## )", text)]
    return {_anchor(section.partition("\n")[0].lstrip("# ")): section for section in sections}


def read_overlay(path: Path) -> list[Entry]:
    """An overlay's entries; none where the file is missing."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    return [
        Entry(text.count("\n", 0, mark.start()) + 1, mark[1], mark[2], text[mark.end() : end].strip("\n"))
        for mark, end in zip(marks, ends, strict=True)
    ]


def build(repo: Repository, document: Document) -> str:
    """The Korean file: the English one with its text replaced, and links that lead to Korean files."""
    korean = {entry.cell: entry.text for entry in read_overlay(document.overlay)}
    localize = _localizer(repo, document)
    texts = {
        cell: localize(korean.get(cell, english)) for cell, english in english_cells(document.english).items()
    }
    if document.english.suffix != ".ipynb":
        source = document.overlay.relative_to(repo.root).as_posix()
        head = f"<!-- Built from {source} by tools/translation.py: edit that file. -->\n"
        return head + "\n\n".join(texts.values()) + "\n"
    notebook = json.loads(document.english.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = texts[cell["id"]].splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _localizer(repo: Repository, document: Document) -> Callable[[str], str]:
    """A function that leads a text's links, as seen from the Korean file, to translations where there are."""
    edition = {_place(repo, other.english): other for other in documents(repo)}
    twins = {place: _place(repo, other.korean) for place, other in edition.items()}
    twins |= {_place(repo, document.korean): _place(repo, document.english)}  # "read this in English"
    start, end = (posixpath.dirname(_place(repo, path)) for path in (document.english, document.korean))

    def lead(target: str, anchor: str) -> str:
        if colab := _COLAB.fullmatch(target):
            return colab[1] + twins.get(colab[2], colab[2])
        if ":" in target:
            return target + anchor
        place = (
            posixpath.normpath(posixpath.join(start, target)) if target else _place(repo, document.english)
        )
        if place in edition and anchor:
            anchor = "#" + _anchors(edition[place]).get(anchor[1:], anchor[1:])
        path = posixpath.relpath(twins.get(place, place), end or ".") if target else ""
        return path + "/" * target.endswith("/") + anchor

    def replace(found: re.Match[str]) -> str:
        link = _TARGET.fullmatch(found[0])
        return link[1] + lead(link[2], link[3] or "") if link else found[0]  # code stays as it is

    return lambda text: re.sub(f"{CODE.pattern}|{_TARGET.pattern}", replace, text)


def _place(repo: Repository, path: Path) -> str:
    return path.relative_to(repo.root).as_posix()


def _anchors(document: Document) -> dict[str, str]:
    """Anchor of each English heading -> that of the Korean heading in its place."""
    korean = "\n".join(entry.text for entry in read_overlay(document.overlay))
    english = "\n".join(english_cells(document.english).values())
    titles = [
        re.findall(r"(?m)^#+ (.*)", re.sub(r"(?ms)^```.*?^```", "", text)) for text in (english, korean)
    ]
    return {_anchor(one): _anchor(other) for one, other in zip(*titles, strict=False)}


def _anchor(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def every_cell_is_translated(repo: Repository) -> Iterator[str]:
    """Every cell has one entry, in order, made of the English text as it is now."""
    for english, overlay, _ in documents(repo):
        cells, entries = english_cells(english), read_overlay(overlay)
        ids = [entry.cell for entry in entries]
        for cell in [cell for cell in cells if cell not in ids]:
            yield repo.at(overlay, 0, f"cell {cell} is missing; translate it:\n{cells[cell]}\n")
        for entry in entries:
            if entry.cell not in cells:
                yield repo.at(overlay, entry.line, f"cell {entry.cell} is not in {english.name}; delete it")
            elif entry.hash != hash_of(cells[entry.cell]):
                yield repo.at(overlay, entry.line, _stale(entry, cells[entry.cell], english.stem))
        if (known := [cell for cell in ids if cell in cells]) != sorted(known, key=list(cells).index):
            yield repo.at(overlay, 0, f"has its cells in another order than {english.name}; move them")
        if repeated := sorted({cell for cell in ids if ids.count(cell) > 1}):
            yield repo.at(overlay, 0, f"has several entries for {repeated}; keep one of each")


def _stale(entry: Entry, english: str, stem: str) -> str:
    stamp = f"python tools/translation.py --stamp {stem} {entry.cell}"
    said = f"cell {entry.cell} translates an older text; correct it, then {stamp}"
    return f"{said}\n--- English now\n{english}\n--- Korean\n{entry.text}\n---"


def translations_hold_what_the_text_holds(repo: Repository) -> Iterator[str]:
    """Links, code, formulas, numbers, headings, tags, tables and lists are those of the English text."""
    for overlay, entry, english in _pairs(repo):
        for finding in part_findings(english, entry.text):
            yield repo.at(overlay, entry.line, f"cell {entry.cell}: {finding}")


def terms_are_those_of_the_glossary(repo: Repository) -> Iterator[str]:
    """A term has one translation, and no other spelling of it stands anywhere."""
    glossary = repo.root / "translations" / "ko" / "glossary.toml"
    for overlay, entry, english in _pairs(repo):
        for finding in glossary_findings(repo.text(glossary), english, entry.text):
            yield repo.at(overlay, entry.line, f"cell {entry.cell}: {finding}")


def _pairs(repo: Repository) -> Iterator[tuple[Path, Entry, str]]:
    """Each entry with its overlay and the English text."""
    for document in documents(repo):
        cells = english_cells(document.english)
        for entry in read_overlay(document.overlay):
            if entry.cell in cells:
                yield document.overlay, entry, cells[entry.cell]


def korean_files_are_built(repo: Repository) -> Iterator[str]:
    """The Korean files are what the build makes, to the byte, and there are no others."""
    expected = {document.korean: document for document in documents(repo)}
    stray = sorted(
        {*(repo.root / "notebooks" / "ko").glob("*"), *repo.root.glob("README.ko.md")} - {*expected}
    )
    for path in [path for path in stray if path.is_file()]:
        yield repo.at(path, 0, "is not in the Korean edition; delete it")
    for path, document in expected.items():
        if repo.text(path) != build(repo, document):
            yield repo.at(path, 0, "is not what the build makes; python tools/translation.py --build")


RULES = (
    every_cell_is_translated,
    translations_hold_what_the_text_holds,
    terms_are_those_of_the_glossary,
    korean_files_are_built,
)


def build_all(repo: Repository) -> None:
    """Write every Korean file."""
    for document in documents(repo):
        document.korean.parent.mkdir(exist_ok=True)
        document.korean.write_text(build(repo, document), encoding="utf-8", newline="\n")


def stamp(document: Document, cells: list[str]) -> None:
    """Write the hashes of the English text as it is now into an overlay: for these cells, or for all.

    Raises:
        ValueError: A cell has no entry.
    """
    english = english_cells(document.english)
    known = {entry.cell for entry in read_overlay(document.overlay)} & english.keys()
    if unknown := sorted(set(cells) - known):
        raise ValueError(f"{document.overlay.name} has no entry for {unknown}; it has {sorted(known)}.")

    def present(mark: re.Match[str]) -> str:
        wanted = mark[1] in (cells or known)
        return mark[0].replace(mark[2], hash_of(english[mark[1]])) if wanted else mark[0]

    text = document.overlay.read_text(encoding="utf-8")
    document.overlay.write_text(_MARK.sub(present, text), encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Build, check or stamp; 1 if the check finds something."""
    parser = argparse.ArgumentParser(description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--build", action="store_true", help="write notebooks/ko and README.ko.md, then check")
    task.add_argument("--check", action="store_true", help="say what is missing, stale or different")
    task.add_argument("--stamp", nargs="+", help="a notebook, then its cells; without cells all of them")
    chosen, repo = parser.parse_args(arguments), Repository(root)
    if chosen.stamp:
        name, *cells = chosen.stamp
        found = [document for document in documents(repo) if document.english.stem.startswith(name)]
        if len(found) != 1:
            sys.exit(
                f"--stamp {name}: expected one of {[document.english.stem for document in documents(repo)]}."
            )
        stamp(found[0], cells)
    if not chosen.check:
        build_all(repo)
    findings = [finding for rule in RULES for finding in rule(repo)]
    print("\n".join(findings) or f"{len(documents(repo))} files in Korean: all as they should be.")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
