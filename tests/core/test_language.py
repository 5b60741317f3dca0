"""The package's own texts in Korean: none missing, none forgotten, and the same values in both languages."""

import ast
import re
import string
from pathlib import Path

import pytest
import torch
from translation_parts import glossary_findings, part_findings

from llama_sft_helpers.core.language import korean, reader_language, translate
from llama_sft_helpers.core.llama import load_llama3_config
from llama_sft_helpers.doctor import TABLE, explain
from llama_sft_helpers.doctor.explanation import _UNKNOWN
from llama_sft_helpers.doctor.table import RENAMED_ARGUMENTS
from llama_sft_helpers.evaluation import chat_box
from llama_sft_helpers.login import AccessError, login_widget
from llama_sft_helpers.login.access import _REMEDIES
from llama_sft_helpers.login.tokens import PLACES
from llama_sft_helpers.memory import plan_memory
from llama_sft_helpers.play import play_data, play_page
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.result_page import _card, result_page

ROOT = Path(__file__).parents[2]
GLOSSARY = (ROOT / "translations" / "ko" / "glossary.toml").read_text(encoding="utf-8")


def texts_in_tables():
    """English texts that stand in data: the doctor's, and what is filled into them."""
    yield from (text for failure in TABLE for text in (failure.title, failure.cause, failure.fix))
    yield from filter(None, _UNKNOWN.values())
    yield from (text for reason in _REMEDIES.values() for name, text in reason.items() if name != "page")
    yield from PLACES.values()
    yield from (_card(path.stem, None, None)[1][5:] for path in (ROOT / "notebooks").glob("*.ipynb"))
    yield from (new for new in RENAMED_ARGUMENTS.values() if " " in new)  # the others are code
    for profile in ("ci-tiny", "colab-t4"):
        yield from plan_memory(load_llama3_config(), read_profile(profile))["component"]


def texts_in_code():
    """Every text that ``translate`` or a page's ``t`` is called with."""
    for path in (ROOT / "llama_sft_helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "translate":
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value
    for path in (ROOT / "llama_sft_helpers" / "templates").glob("*.jinja"):
        calls = re.findall(r"""\bt\((?:"([^"]+)"|'([^']+)')""", path.read_text(encoding="utf-8"))
        yield from (double or single for double, single in calls)


def texts_in_script():
    """What ``play.js`` says, and the names in the data that it shows."""
    script = (ROOT / "llama_sft_helpers" / "templates" / "play.js").read_text(encoding="utf-8")
    yield from re.findall(r'\bt\("([^"]+)"', script)
    for both in re.findall(r'\bmany\([^"]+"([^"]+)", "([^"]+)"', script):
        yield from both
    yield from play_data()["memory"]["components"]
    yield from (rung["change"] for rung in play_data()["speed"]["rungs"])


SCRIPT = {*texts_in_script()}
USED = {*texts_in_tables(), *texts_in_code(), *SCRIPT}


def test_every_text_of_the_package_has_its_korean_and_no_korean_is_left_over():
    missing = {text for text in USED - korean().keys() if not re.fullmatch(r"\{\w+\}|LoRA", text)}
    assert sorted(missing) == []
    assert sorted(SCRIPT - korean("play_js").keys()) == []
    assert sorted(korean().keys() - USED) == []


@pytest.mark.parametrize(("english", "text"), korean().items())
def test_both_languages_hold_the_same_values_code_numbers_and_terms(english, text):
    fields = [sorted(field for _, field, _, _ in fields_of(part) if field) for part in (english, text)]
    assert fields[0] == fields[1]
    assert list(part_findings(english, text)) == []
    prose = re.sub(r"[\w.]+", lambda word: "" if word[0] in text else word[0], english)  # without names
    assert list(glossary_findings(GLOSSARY, prose, text)) == []
    assert text != english


def fields_of(text):
    """The ``{...}`` of a text; the braces of code that a text quotes are none."""
    return string.Formatter().parse(re.sub(r"\{(?![a-z_]+[:}]).*?\}", "", text))


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "ko_KR.UTF-8", "SFT_LANG": "en"}, "en"),
        ({"LANG": "en_US.UTF-8", "SFT_LANG": "ko"}, "ko"),
        ({"LANG": "kok_IN"}, "en"),
        ({"LANG": "fr_FR.UTF-8"}, "en"),
        ({}, "en"),
    ],
)
def test_the_language_is_the_one_asked_for_or_the_systems(variables, language, monkeypatch):
    for name in ("SFT_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reader_language() == language


def test_a_text_without_korean_stays_english():
    assert translate("Nobody wrote this {thing}.", "ko", thing="one") == "Nobody wrote this one."


class ReportedError(Exception):
    """A cell's failure, as nbclient reports it."""

    ename = "TypeError"
    evalue = "SFTTrainer.__init__() got an unexpected keyword argument 'tokenizer'"


def test_the_doctor_speaks_korean_with_its_values_filled_in(monkeypatch):
    monkeypatch.setenv("SFT_LANG", "ko")
    found = explain(ReportedError())
    assert found.fix == "대신 이렇게 쓰세요: SFTTrainer(processing_class=...)."
    assert "`SFTTrainer`에는 `tokenizer` 인자가 없습니다" in found.cause
    assert "\n  원인:" in repr(found)
    assert "<br>해결: " in found._repr_html_()
    assert explain(OSError(28, "No space left on device", "/data")).cause.endswith("못했습니다: /data.")


def test_the_doctor_quotes_the_memory_plan_in_korean(monkeypatch):
    monkeypatch.setenv("SFT_LANG", "ko")
    monkeypatch.setenv("SFT_PROFILE", "colab-t4")
    found = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.25 GiB."))
    assert re.search(
        r"가장 큰 항목은 양자화한 가중치 6\.\d\d GiB입니다\(가중치 [\d,]+개와 그 스케일\)", found.cause
    )


@pytest.mark.parametrize("profile", ["ci-tiny", "colab-a100", "colab-l4", "colab-t4"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "fast_int8": False}])
def test_every_figure_of_the_plan_is_explained_in_korean(profile, changes):
    plan = plan_memory(load_llama3_config(), read_profile(profile, **changes), language="ko")
    for how in plan["how"]:
        assert re.findall(r"[A-Za-z]{3,} [a-z]+", how) == [], how


def test_the_login_field_is_labelled_in_korean(monkeypatch):
    monkeypatch.setenv("SFT_LANG", "ko")
    _, row, status = login_widget("meta-llama/Meta-Llama-3-8B").children
    assert [widget.description for widget in row.children] == ["토큰", "로그인"]
    assert "토큰" in status.value
    said = str(AccessError("not-found", "org/none", "HTTP 404"))
    assert said.startswith(
        "not-found: 이 계정으로는 허브에서 org/none 모델을 찾을 수 없습니다(HTTP 404).\n페이지: "
    )


def test_the_chat_field_is_labelled_in_korean(monkeypatch):
    monkeypatch.setenv("SFT_LANG", "ko")
    row, choice, _ = chat_box(lambda text, tuned: iter(())).children
    assert (row.children[1].description, choice.label, choice.value) == ("보내기", "조정된 모델", "tuned")


def test_the_play_page_differs_in_its_words_only():
    english, page = (play_page(language=language) for language in ("en", "ko"))
    assert '<html lang="ko">' in page
    kept = (
        r'(?s)<script>.*?</script>|<script [^>]*"data">.*?</script>| (?:id|name|min|max|step|value)="[^"]*"'
    )
    assert re.findall(kept, page) == re.findall(kept, english)
    words = re.sub(r"(?s)<(script|style|select).*?</\1>|<[^>]+>", " ", page)
    sentences = re.findall(r"(?:[A-Za-z,']+ ){4,}", words)
    assert sentences == []


def test_the_result_page_is_korean_for_a_korean_reader(monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_LANG", "ko")
    page = result_page(
        tmp_path, "cpu-demo", "a model", {"04_lora": 8.0, "06_training": None}, ["06_training"]
    )
    for part in (
        '<html lang="ko">',
        "노트북 2개 가운데 1개가 끝났습니다",
        "06 · 학습",
        "실행 중",
        "0:08 만에 끝남",
    ):
        assert part in page
    words = re.sub(r"(?s)<(script|style|code).*?</\1>|<[^>]+>", " ", page)
    assert re.findall(r"(?:[A-Za-z,']+ ){4,}", words) == []
