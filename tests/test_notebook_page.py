"""A notebook's page: formulas, links and pictures without a network."""

import nbformat
import pytest

from llama_sft_helpers.notebook_page import notebook_page

BADGE = "[![Open In Colab](https://example.org/badge.svg)](https://example.org/04_lora.ipynb)"
WORDS = f"""# Title
{BADGE} [next](05_data.ipynb), [section](06_training.ipynb#plan)

The scale $s_i$ and (Korean) $p$는 and $$y = W x + \\frac{{\\alpha}}{{r}} B (A x)$$; `echo $HOME $PATH`.

```text
echo $A $B
```

## Second _part_
"""


@pytest.mark.parametrize(("title", "language"), [("# 03 · 양자화", "ko"), ("# 03 · Quantization", "en")])
def test_the_page_names_its_language(title, language):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title)])
    assert f'<html lang="{language}">' in notebook_page(notebook, "03_quantization")


@pytest.fixture(scope="module")
def page():
    cells = [nbformat.v4.new_markdown_cell(WORDS), nbformat.v4.new_code_cell("print('$x$')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    text = notebook_page(notebook, "04_lora")
    assert notebook.cells[0].source == WORDS
    return text


def test_formulas_are_mathml_and_code_keeps_its_dollars(page):
    assert page.count("<math") == page.count("</math>")
    assert page.count('display="block"') - page.count('math[display="block"]') == 1
    assert "<mfrac>" in page
    assert "$p" not in page
    for kept in ("$HOME $PATH", "echo $A $B"):
        assert kept in page
    assert "set-aside-" not in page


def test_nothing_is_fetched(page):
    fetched = [part.split('"')[0] for key in (' src="', "<link ") for part in page.split(key)[1:]]
    assert [url for url in fetched if not url.startswith("data:")] == []
    assert "MathJax" not in page


def test_links_lead_to_pages_and_a_badge_is_words(page):
    assert 'href="05_data.html"' in page
    assert 'href="06_training.html#plan"' in page
    assert '<a href="https://example.org/04_lora.ipynb">Open In Colab</a>' in page


def test_headings_can_be_linked_and_code_copied(page):
    assert 'id="Second-part"' in page
    assert 'class="series"' in page
    assert 'button.textContent = "Copy"' in page
