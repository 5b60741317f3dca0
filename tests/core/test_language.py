"""The package's own texts in Korean: none missing, none forgotten, and the same values in both languages."""

import ast
import re
import string
from pathlib import Path

import pytest
from translation_parts import glossary_findings, part_findings

from llama_sft_helpers.core.language import korean, reader_language, translate
from llama_sft_helpers.doctor import TABLE, explain
from llama_sft_helpers.doctor.explanation import _UNKNOWN
from llama_sft_helpers.doctor.table import RENAMED_ARGUMENTS
from llama_sft_helpers.evaluation.chat import chat_box
from llama_sft_helpers.login import login_widget
from llama_sft_helpers.login.access import _REMEDIES, AccessError
from llama_sft_helpers.login.tokens import PLACES

ROOT = Path(__file__).parents[2]
GLOSSARY = (ROOT / "translations" / "ko" / "glossary.toml").read_text(encoding="utf-8")


def texts_in_tables():
    """English texts that stand in data: the doctor's, and what is filled into them."""
    yield from (text for failure in TABLE for text in (failure.title, failure.cause, failure.fix))
    yield from filter(None, _UNKNOWN.values())
    yield from (text for reason in _REMEDIES.values() for name, text in reason.items() if name != "page")
    yield from PLACES.values()
    yield from (new for new in RENAMED_ARGUMENTS.values() if " " in new)  # the others are code


def texts_in_code():
    """First argument of every call of ``translate``, where it is a text."""
    for path in (ROOT / "llama_sft_helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "translate":
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


USED = {*texts_in_tables(), *texts_in_code()}


def test_every_text_of_the_package_has_its_korean_and_no_korean_is_left_over():
    missing = {text for text in USED - korean().keys() if not re.fullmatch(r"\{\w+\}", text)}
    assert sorted(missing) == []
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
