"""The site's Markdown: what stands in a recorded notebook is on its page, and its links lead somewhere."""

import re

import docs_home
import docs_results
import jinja2
import nbformat
import pytest
from docs_markdown import API, ROOT, button, page_of, site_links
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from record import NO_WIDGET

from llama_sft_helpers.notebook_page import put_back

BLOB = "https://github.com/a/b/blob/main/"


@pytest.mark.parametrize(
    ("text", "folder", "page", "expected"),
    [
        ("[x](04_lora.ipynb)", "notebooks", "notebooks/03_quantization.md", "[x](04_lora.md)"),
        ("[x](../llama_sft_helpers/lora/)", "notebooks", "notebooks/04_lora.md", "[x](../api/lora.md)"),
        ("[x](04_lora.ipynb)", "notebooks/ko", "ko/notebooks/03_quantization.md", "[x](04_lora.md)"),
        (
            "[x](../../llama_sft_helpers/lora/)",
            "notebooks/ko",
            "ko/notebooks/04_lora.md",
            "[x](../../api/lora.md)",
        ),
        (
            "[x](../04_lora.ipynb)",
            "notebooks/ko",
            "ko/notebooks/05_data.md",
            "[x](../../notebooks/04_lora.md)",
        ),
        ("[x](../README.ko.md)", "docs", "index.md", "[x](ko/index.md)"),
        ("[x](docs/speed.md#several-gpus)", "", "index.md", "[x](speed.md#several-gpus)"),
        ("[x](../benchmarks/NOTES.md)", "docs", "speed.md", f"[x]({BLOB}benchmarks/NOTES.md)"),
        ("[x](https://a.b/docs/speed.md) `a[0](gone)`", "", "index.md", None),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(text, folder, page, expected):
    assert site_links(text, folder, page, BLOB) == (expected or text)


def page(*cells):
    """A notebook's page before the theme, and its pictures."""
    pieces, files = [], {}
    return put_back(page_of(new_notebook(cells=list(cells)), pieces, files), pieces), files


def test_outputs_keep_what_markdown_would_change():
    outputs = [
        new_output("stream", text="``` *a* <b>"),
        new_output("display_data", data={"text/html": '<style>td{}</style><table border="1"><tr><td>_1_'}),
        new_output(
            "display_data",
            data={"image/png": "AAAA"},
            metadata={"image/png": {"alt": 'say "x"', "width": 2, "height": 1}},
        ),
    ]
    text, files = page(new_code_cell("x = 1", outputs=outputs))
    assert "<pre>``` *a* &lt;b&gt;</pre><table><tr><td>_1_<img" in text
    assert 'alt="say &quot;x&quot;" width="2" height="1"' in text
    assert list(files) == ["figure-1.png"]


@pytest.mark.parametrize(("source", "name"), [("login_widget()", "login"), ("chat_box(answer)", "chat")])
def test_a_widget_is_a_picture_of_it(source, name):
    output = new_output("display_data", data={"text/plain": NO_WIDGET})
    text, _ = page(new_code_cell(source, outputs=[output]))
    assert f'<img src="../../widgets/{name}.png" alt="A field for ' in text
    assert (ROOT / "docs" / "widgets" / f"{name}.png").is_file()


def test_every_module_has_a_page():
    package = ROOT / "llama_sft_helpers"
    modules = {path.stem for path in package.glob("[a-z]*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert modules - set(API) == {"core"}  # each fact that several steps need; offered by those it is about


def test_titled_cells_are_folded_and_formulas_are_mathml():
    text, _ = page(new_code_cell("# @title Imports\nimport os"), new_markdown_cell("Then $r^2$ and `$5`"))
    assert "<summary>Imports</summary>" in text
    assert "<msup><mi>r</mi><mn>2</mn></msup>" in text
    assert "`$5`" in text


NOTEBOOKS = {
    language: sorted((ROOT / "notebooks" / folder).glob("*.ipynb"))
    for language, folder in (("en", ""), ("ko", "ko"))
}


@pytest.mark.parametrize("path", NOTEBOOKS["en"] + NOTEBOOKS["ko"], ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_title_button_and_minutes(path):
    notebook = nbformat.read(path, as_version=4)
    text = button(page_of(notebook, [], {}))
    assert text.startswith(f"# {path.stem[:2]} · ")
    place = f"llama-sft/llama-sft-notebooks/blob/main/{path.relative_to(ROOT).as_posix()}){{ .md-button"
    assert f"[Open in Colab](https://colab.research.google.com/github/{place}" in text
    assert f"[GitHub](https://github.com/{place}" in text
    assert ("\n- 시간: " if path in NOTEBOOKS["ko"] else "\n- Time: ") in text
    assert "badge.svg" not in text
    assert not re.search(r"\[(previous|next|이전|다음): ", text)


TEMPLATING = jinja2.Environment(undefined=jinja2.StrictUndefined)


@pytest.mark.parametrize(
    ("template", "language", "seen", "facts"),
    [
        ("index.md", "en", "See `Linear` beside", r"CPU demo: [\d.]+ min · 8B: [\d.]+ min"),
        ("ko/index.md", "ko", "`Linear`와 `Linear8bitLt`를", r"CPU 데모: [\d.]+분 · 8B: [\d.]+분"),
    ],
)
def test_a_start_page_has_a_card_for_each_notebook_and_the_readmes_figures(template, language, seen, facts):
    text = (ROOT / "docs" / template).read_text(encoding="utf-8")
    page = TEMPLATING.from_string(text).render(vars(docs_home))
    for path in NOTEBOOKS[language]:
        place = path.relative_to(ROOT).as_posix()
        title = nbformat.read(path, as_version=4).cells[0].source.partition("# ")[2].partition("\n")[0]
        assert f"**[{title}](../{place})**\n\n" in page
        assert f"blob/main/{place})\n" in page  # its link to Colab
    readme = (ROOT / ("README.md" if language == "en" else "README.ko.md")).read_text(encoding="utf-8")
    told = re.search(f"{re.escape(seen)}.*<sub>({facts})", readme)[1]
    assert re.search(f"\n    {re.escape(seen)}.*\n\n    {re.escape(told)}", page)
    assert "\n</div>\n\n\n" in page  # then what was measured on
    assert page.count('<img src="../docs/images/') == 2


def test_both_start_pages_have_the_same_headings_and_numbers():
    english, korean = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("index.md", "ko/index.md")
    )
    assert english.count("\n## ") == korean.count("\n## ")
    english, korean = (text.partition("\n## ")[2].partition("{{ cards")[0] for text in (english, korean))
    assert sorted(re.findall(r"[\d.]*\d", english)) == sorted(re.findall(r"[\d.]*\d", korean))


def test_the_benchmark_page_speaks_of_every_result():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    page = TEMPLATING.from_string(text).render(vars(docs_results))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"[`{path.name}`](../benchmarks/results/{path.name})" in page


def test_bars_are_as_long_as_their_values():
    chart = docs_results.bars([("a<b", 2), ("c", 4), ("d", None)], missing="did not finish", mark={"c": 3})
    assert '>a&lt;b</th><td><span style="width:50.0%"></span></td><td>2</td>' in chart
    assert '<span style="width:100.0%"></span><i style="left:75.0%"></i></td><td>4 / 3</td>' in chart
    assert "<td>did not finish</td>" in chart


def test_shares_of_a_cpus_time_are_of_the_whole(monkeypatch):
    found = {"limits": {"avx2": {"step": {"seconds": {"attention": 1.0, "products": 3.0}}}}}
    monkeypatch.setattr(docs_results, "read_results", {"cpu_profile": found}.get)
    assert docs_results.cpu_shares("step", "avx2") == [("products", 0.75), ("attention", 0.25)]


def test_minutes_stand_in_pairs_before_and_after(monkeypatch):
    found = {
        f"minutes_{part}": {"summary": {part: {"minutes_old": 2.0 * n, "minutes_new": 1.0 * n}}}
        for n, part in enumerate(("demo", "tests"), start=1)
    }
    monkeypatch.setattr(docs_results, "read_results", found.get)
    assert docs_results.pair_minutes() == [
        ("demo, before", 2.0), ("demo, after", 1.0), ("tests, before", 4.0), ("tests, after", 2.0),
    ]  # fmt: skip
