"""``interact``: controls before a reader, one still picture where nobody could move them."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from llama_sft_helpers.sliders import interact

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CELL = """
from llama_sft_helpers.sliders import interact

def area(width=3, height=4):
    print(f"{width} x {height} is {width * height}")
    return width * height

interact(area, width=(1, 8), height=[2, 4])
"""


@pytest.fixture(scope="module")
def outputs_of():
    """What a fresh kernel answers to the cell, sent by somebody who can or cannot be asked."""
    manager, client = start_new_kernel()

    def outputs_of(somebody):
        answers = []
        client.execute_interactive(CELL, allow_stdin=somebody, output_hook=answers.append, timeout=60)
        found = [answer["content"] for answer in answers if "stream" in answer["msg_type"]]
        return found + [answer["content"]["data"] for answer in answers if "data" in answer["content"]]

    yield outputs_of
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_program_gets_a_still_picture(outputs_of):
    assert outputs_of(False) == [{"name": "stdout", "text": "3 x 4 is 12\n"}, {"text/plain": "12"}]


def test_a_reader_gets_the_controls(outputs_of):
    assert any("application/vnd.jupyter.widget-view+json" in output for output in outputs_of(True))


def test_controls_start_at_the_defaults(monkeypatch):
    shell = SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    calls = []
    interact(lambda width=3, kind="b": calls.append((width, kind)), width=(1, 8), kind=["a", "b"])
    assert calls == [(3, "b")]


def test_a_control_without_a_parameter_is_refused():
    with pytest.raises(TypeError, match="depth"):
        interact(lambda width=3: width, depth=(1, 8))


@pytest.mark.parametrize("name", ["01", "03", "04", "05", "06", "08"])
def test_a_notebook_has_controls_after_words(name):
    """In each, one cell of controls for a function that stands in it and runs without arguments."""
    (path,) = NOTEBOOKS.glob(f"{name}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    (place,) = (n for n, cell in enumerate(cells) if re.search("^interact\\(", cell.source, re.MULTILINE))
    assert cells[place - 1].cell_type == "markdown"
    *_, function, call = ast.parse(cells[place].source).body
    parameters = [parameter.arg for parameter in function.args.args]
    assert len(function.args.defaults) == len(parameters)
    assert {control.arg for control in call.value.keywords} <= set(parameters)
