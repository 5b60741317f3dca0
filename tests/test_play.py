"""``play.html``: it is built, fetches nothing, and computes what the Python code computes."""

import json
import re
import shutil
import subprocess

import pytest
from play_settings import MODEL, assert_equal, settings
from typer.testing import CliRunner

from llama_sft_helpers.cli import app
from llama_sft_helpers.play import play_data, play_page
from llama_sft_helpers.profiles import read_profile

NODE = shutil.which("node")
CALL = """
const { data, calls } = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(calls.map(([name, args]) => eval(name)(data, ...args))));
"""


@pytest.fixture(scope="module")
def data():
    return json.loads(json.dumps(play_data()))


@pytest.mark.skipif(not NODE, reason="no node; tests/browser/test_play_page.py asks chromium")
def test_javascript_and_python_agree_on_200_settings(data):
    expected = settings(data)
    calls = [[name, args] for name, args, _ in expected]
    script = MODEL.read_text(encoding="utf-8") + CALL
    command = [NODE, "--input-type=commonjs", "--eval", script]
    done = subprocess.run(
        command, input=json.dumps({"data": data, "calls": calls}), capture_output=True, text=True, check=True
    )
    assert_equal(expected, json.loads(done.stdout))


def test_the_page_holds_the_codes_numbers_and_fetches_nothing(data):
    page = play_page()
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(held[1]) == data
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))
    assert "index.html" not in page
    assert '<a href="index.html">' in play_page(home="index.html")


def test_each_control_has_a_label(data):
    page = play_page()
    controls = re.findall(r'<(?:input|select|textarea)[^>]* id="([^"]+)"', page)
    assert len(controls) == len(set(controls)) == len(re.findall(r"<(?:input|select|textarea) ", page)) > 20
    assert sorted(re.findall(r'<label[^>]* for="([^"]+)"', page)) == sorted(controls)


def test_a_card_starts_with_its_profile(data):
    for card in data["memory"]["cards"].values():
        profile = read_profile(card["profile"])
        assert card["batches"][card["batch"]] == profile.per_device_train_batch_size
        assert card["lengths"][card["length"]] == profile.max_length
        assert card["checkpointing"] == profile.gradient_checkpointing


def test_the_command_writes_the_page_and_opens_it(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    result = CliRunner().invoke(app, ["play", "--out", str(tmp_path / "new"), "--open"])
    assert result.exit_code == 0, result.output
    assert opened == [(tmp_path / "new" / "play.html").as_uri()]
    assert "Play with the numbers" in (tmp_path / "new" / "play.html").read_text(encoding="utf-8")
