"""The site's Markdown: what stands in a recorded notebook is on its page, and its links lead somewhere."""

import nbformat
import pytest
from docs_markdown import ROOT, button, page_of, site_links
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llama_sft_helpers.notebook_page import put_back

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAC0lEQVR42mNgQAcAABIAAXfx+oEAAAAASUVORK5CYII="
BLOB = "https://github.com/a/b/blob/main/"


@pytest.mark.parametrize(
    ("text", "folder", "page", "expected"),
    [
        ("[x](04_lora.ipynb)", "notebooks", "notebooks/03_quantization.md", "[x](04_lora.md)"),
        ("[x](../llama_sft_helpers/lora/)", "notebooks", "notebooks/04_lora.md", "[x](../api/lora.md)"),
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
        new_output("display_data", data={"image/png": PNG}),
    ]
    text, files = page(new_code_cell("x = 1", outputs=outputs, metadata={"alt": 'say "x"'}))
    assert "<pre>``` *a* &lt;b&gt;</pre><table><tr><td>_1_<img" in text
    assert 'alt="say &quot;x&quot;" width="2" height="1"' in text
    assert list(files) == ["figure-1.png"]


def test_titled_cells_are_folded_and_formulas_are_mathml():
    text, _ = page(new_code_cell("# @title Imports\nimport os"), new_markdown_cell("Then $r^2$ and `$5`"))
    assert "<summary>Imports</summary>" in text
    assert "<msup><mi>r</mi><mn>2</mn></msup>" in text
    assert "`$5`" in text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_title_button_and_minutes(path):
    notebook = nbformat.read(path, as_version=4)
    text = button(page_of(notebook, [], {}))
    assert text.startswith(f"# {path.stem[:2]} · ")
    assert f"blob/main/notebooks/{path.name}){{ .md-button" in text
    assert "\n- Time: " in text
    assert "badge.svg" not in text
    assert "[next: " not in text
