"""The Korean edition: what the build copies, where its links lead, what a stamp changes."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
import translation
from repository import Repository
from translation_parts import glossary_findings, part_findings

ROOT = Path(__file__).parent.parent
REPO = Repository(ROOT)
NOTEBOOKS = [item for item in translation.documents(REPO) if item.english.suffix == ".ipynb"]
COLAB = "https://colab.research.google.com/github/a/b/blob/main/notebooks"


@pytest.mark.parametrize("document", NOTEBOOKS, ids=lambda document: document.english.stem)
def test_all_but_the_text_is_that_of_the_english_notebook(document):
    english, korean = (json.loads(path.read_text(encoding="utf-8")) for path in (document[0], document[2]))
    for notebook in (english, korean):
        for cell in notebook["cells"]:
            cell["source"] = cell["source"] if cell["cell_type"] == "code" else "text"
    assert json.dumps(korean) == json.dumps(english)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """Two notebooks in the edition, one that waits, and the README."""
    monkeypatch.setattr(translation, "WAITING", ("03_c",))
    files = {
        "notebooks/01_a.ipynb": "## First part\n\nx",
        "notebooks/02_b.ipynb": "y",
        "notebooks/03_c.ipynb": "z",
        "README.md": "# Title\n\n## Two commands\n\n1",
    }
    (tmp_path / "notebooks").mkdir()
    for name, text in files.items():
        cells = [nbformat.v4.new_markdown_cell(text, id="a"), nbformat.v4.new_code_cell("x = 1  # 1", id="b")]
        notebook = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
        (tmp_path / name).write_text(text if name == "README.md" else notebook, encoding="utf-8")
    overlay(tmp_path, "01_a", a="## 첫째 부분\n\n가")
    overlay(tmp_path, "02_b", a="나")
    overlay(tmp_path, "README", title="# 제목", **{"two-commands": "## 명령 둘\n\n1"})
    translation.main(["--stamp", "README"], tmp_path)
    return Repository(tmp_path)


def overlay(root, stem, **entries):
    path = root / "translations" / "ko" / f"{stem}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = [f"<!-- cell {cell} 0123456789ab -->\n{text}\n" for cell, text in entries.items()]
    path.write_text("\n".join(marked), encoding="utf-8")


def built(repo, name):
    """The text of a Korean notebook's first cell, or of the README, as the build makes it now."""
    (document,) = [item for item in translation.documents(repo) if item.english.stem == name]
    text = translation.build(repo, document)
    return text if name == "README" else "".join(json.loads(text)["cells"][0]["source"])


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [
        (f"({COLAB}/02_b.ipynb)", f"({COLAB}/ko/02_b.ipynb)"),
        (f"({COLAB}/03_c.ipynb)", f"({COLAB}/03_c.ipynb)"),
        ("(01_a.ipynb)", "(01_a.ipynb)"),
        ("(01_a.ipynb#first-part)", "(01_a.ipynb#첫째-부분)"),
        ("(03_c.ipynb#first-part)", "(../03_c.ipynb#first-part)"),
        ("(../docs/speed.md#x)", "(../../docs/speed.md#x)"),
        ("(../README.md)", "(../../README.ko.md)"),
        ("(../llama/login/)", "(../../llama/login/)"),
        ("(https://x.org/a#b)", "(https://x.org/a#b)"),
    ],
)
def test_links_lead_where_the_english_ones_do(repo, link, leads_to):
    overlay(repo.root, "02_b", a=f'[가]{link} <a href="{link[1:-1]}"> `a[0]{link}`\n```\n[x]{link}\n```')
    expected = f'[가]{leads_to} <a href="{leads_to[1:-1]}"> `a[0]{link}`\n```\n[x]{link}\n```'
    assert built(repo, "02_b") == expected


def test_the_readme_is_built_of_its_sections(repo):
    links = "[English](README.ko.md) [1](notebooks/01_a.ipynb) [3](notebooks/03_c.ipynb)"
    overlay(repo.root, "README", title=f"# 제목\n\n{links}")
    head, *lines = built(repo, "README").splitlines()
    assert "translations/ko/README.md" in head
    links = "[English](README.md) [1](notebooks/ko/01_a.ipynb) [3](notebooks/03_c.ipynb)"
    assert lines == ["# 제목", "", links, "", "## Two commands", "", "1"]


def test_a_stamp_takes_the_cells_that_were_read_and_a_build_makes_all_green(repo, capsys):
    root = repo.root
    assert translation.main(["--check"], root) == 1
    assert translation.main(["--stamp", "01", "a"], root) == 1, "02_b is still stale"
    assert "02_b.md:1: cell a translates an older text" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"01_a.md has no entry for \['q'\]"):
        translation.main(["--stamp", "01", "q"], root)
    with pytest.raises(SystemExit, match="--stamp 03: expected one of"):
        translation.main(["--stamp", "03"], root)
    assert translation.main(["--stamp", "02"], root) == 0, capsys.readouterr().out
    assert translation.main(["--check"], root) == 0
    shutil.copy(root / "notebooks/02_b.ipynb", root / "notebooks/01_a.ipynb")  # an edit of the English text
    assert translation.main(["--check"], root) == 1
    assert "--- English now\ny\n--- Korean\n## 첫째 부분" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("english", "korean"),
    [
        ("In 2 s, int8 takes `a` and $x$ [1](b).", "$x$와 `a`는 int8과 int8로 [1](b), 2초 안에."),
        ("| `a \\| b` | 1 |\n|---|---|", "| `a \\| b` | 1 |\n|---|---|"),
        ("It costs 1,024.", "1,024입니다."),
    ],
)
def test_sentences_may_be_built_otherwise(english, korean):
    assert list(part_findings(english, korean)) == []


def test_a_term_in_code_or_in_a_title_needs_no_translation():
    glossary = '[[term]]\nenglish = "loss"\nkorean = "손실"\nforbidden = ["로스"]'
    assert list(glossary_findings(glossary, "`loss` [a](loss.md) Loss", "`로스` [a](loss.md) Loss")) == []
