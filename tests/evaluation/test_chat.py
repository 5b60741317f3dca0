"""The streamed answer, the terminal and the box."""

import asyncio
import io
import subprocess
import sys

import pytest
import torch

from llama_sft_helpers.evaluation import ChatError, chat_box, run_chat, stream_answer

PROMPT = "### Instruction:\nName a fruit.\n\n### Response:\n"


def generated(trained, **options):
    """The reference: one plain ``generate``."""
    batch = trained.tokenizer(PROMPT, return_tensors="pt")
    ids = trained.model.generate(**batch, do_sample=False, pad_token_id=0, **options)
    return trained.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("tuned", [True, False])
def test_pieces_add_up_to_what_generate_gives(trained, tuned):
    pieces = list(stream_answer(trained.model, trained.tokenizer, PROMPT, tuned=tuned, max_new_tokens=20))
    if tuned:
        expected = generated(trained, max_new_tokens=20)
    else:
        with trained.model.disable_adapter():
            expected = generated(trained, max_new_tokens=20)
    assert "".join(pieces) == expected


def test_text_comes_in_pieces_before_the_end(trained):
    """A wordy model: its logits are replaced by a fixed sequence of words."""
    ids = trained.tokenizer("one two three four five six", add_special_tokens=False).input_ids
    words = iter(ids)

    def say_next(*_):
        return torch.nn.functional.one_hot(torch.full((1, 1), next(words, 0)), len(trained.tokenizer)).float()

    hook = trained.model.get_output_embeddings().register_forward_hook(say_next)
    try:
        pieces = list(stream_answer(trained.model, trained.tokenizer, PROMPT, max_new_tokens=len(ids)))
    finally:
        hook.remove()
    assert "".join(pieces) == "one two three four five six"
    assert len(pieces) > 2


def test_base_and_tuned_differ_and_the_adapter_is_on_again(trained):
    def said(tuned):
        return "".join(
            stream_answer(trained.model, trained.tokenizer, PROMPT, tuned=tuned, max_new_tokens=20)
        )

    first = said(True)
    assert said(False) != first
    assert said(True) == first


def test_the_answer_stops_at_eos(trained):
    tokenizer, eos = trained.tokenizer, trained.tokenizer.eos_token_id
    head = trained.model.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda *_: torch.nn.functional.one_hot(torch.full((1, 1), eos), len(tokenizer)).float()
    )
    try:
        assert list(stream_answer(trained.model, tokenizer, PROMPT, max_new_tokens=50)) == []
    finally:
        hook.remove()


def test_closing_early_ends_the_generation(trained):
    steps = []
    hook = trained.model.register_forward_hook(lambda *_: steps.append(1))
    base_hook = trained.model.get_base_model().register_forward_hook(lambda *_: steps.append(1))
    try:
        pieces = stream_answer(trained.model, trained.tokenizer, PROMPT, max_new_tokens=1500)
        next(pieces)
        pieces.close()
    finally:
        hook.remove()
        base_hook.remove()
    assert 0 < len(steps) < 1000


def test_an_error_while_generating_reaches_the_caller(trained):
    def fail(*_):
        raise RuntimeError("out of luck")

    hook = trained.model.get_output_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(ChatError, match="out of luck"):
            list(stream_answer(trained.model, trained.tokenizer, PROMPT))
    finally:
        hook.remove()


# --- The terminal ---


def echo(text, tuned):
    yield f"{'T' if tuned else 'B'}:"
    yield text + " [bold]x[/bold]"


def talk(monkeypatch, capsys, lines, **options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_chat(echo, **options)
    return capsys.readouterr().out


def test_commands_switch_and_leave(monkeypatch, capsys):
    out = talk(monkeypatch, capsys, "one\n/base\ntwo\n\n/tuned\nthree\n/help\n/quit\nfour\n")
    for expected in ("T:one [bold]x[/bold]", "B:two", "T:three", "Commands: /base, /tuned, /quit."):
        assert expected in out
    assert "four" not in out


def test_emoji_codes_in_an_answer_stay_as_they_are(monkeypatch, capsys):
    assert "T:use :warning: and :100:" in talk(monkeypatch, capsys, "use :warning: and :100:")


def test_control_characters_of_an_answer_do_not_reach_the_terminal(monkeypatch, capsys):
    sent = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]8;;x\x1b\\b\x1bc\x07\b\r\x00\x7f\x9b2J\tc\nd \u00e9"
    monkeypatch.setattr(sys, "stdin", io.StringIO("go"))
    run_chat(lambda text, tuned: iter_pieces([sent, "split \x1b", "[2Jend"]))
    assert "aredb2J c\nd \u00e9split [2Jend" in capsys.readouterr().out  # rich makes a tab a space


def iter_pieces(pieces):
    yield from pieces


def test_the_end_of_the_input_leaves_and_a_prompt_answers_once(monkeypatch, capsys):
    assert "B:one" in talk(monkeypatch, capsys, "one", tuned=False)
    assert talk(monkeypatch, capsys, "ignored", prompt="just this") == "T:just this [bold]x[/bold]\n"


def test_ctrl_c_ends_an_answer_not_the_talk(monkeypatch, capsys):
    def interrupted(text, tuned):
        yield "begun"
        if text == "long":
            raise KeyboardInterrupt
        yield " and done"

    monkeypatch.setattr(sys, "stdin", io.StringIO("long\nshort\n"))
    run_chat(interrupted)
    out = capsys.readouterr().out
    assert "begun [stopped]" in out
    assert "begun and done" in out


def test_the_command_answers_and_explains(trained):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "llama_sft_helpers.cli", "chat", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
        )

    good = command(trained.adapter, "--prompt", "Name a fruit.", "--max-new-tokens", 12)
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""  # no line a product from bitsandbytes, no progress bars
    from llama_sft_helpers.data import to_prompt_completion

    prompt = to_prompt_completion({"instruction": "Name a fruit.", "output": "-"})["prompt"]
    expected = "".join(stream_answer(trained.model, trained.tokenizer, prompt, max_new_tokens=12))
    assert good.stdout == expected + "\n"
    bad = command(trained.folder / "none")
    assert bad.returncode == 1
    assert "Run notebook 06 first" in bad.stderr
    assert "Traceback" not in bad.stderr


# --- The box ---


def parts(box):
    row, choice, page = box.children
    return *row.children, choice, page


def test_the_box_streams_switches_and_escapes():
    seen = []

    def answer(text, tuned):
        for piece in ("<b>", "ok"):
            yield f"{tuned}{piece}"
            seen.append(page.value)

    message, send, choice, page = parts(chat_box(answer))
    message.value = "<i>hi</i>"
    send.click()
    assert "&lt;i&gt;hi&lt;/i&gt;" in page.value
    assert "True&lt;b&gt;Trueok" in page.value
    assert "ok" not in seen[0]
    assert message.value == ""
    choice.value = "base"
    message.value = "again"
    send.click()
    assert "Falseok" in page.value
    assert page.value.index("Trueok") < page.value.index("Falseok")
    before = page.value
    send.click()
    assert page.value == before, "an empty message must do nothing"


def test_enter_sends_the_text_that_arrives_just_after_it():
    """The browser reports the key first and the text second; a field left without Enter sends nothing."""
    heard = []

    def answer(text, tuned):
        heard.append(text)
        yield "ok"

    async def type_and_press_enter():
        message, _, _, page = parts(chat_box(answer))
        message.value = "Nam"
        await asyncio.sleep(0.3)
        assert heard == []
        message._handle_msg(
            {"content": {"data": {"method": "custom", "content": {"event": "submit"}}}, "buffers": []}
        )
        message.value = "Name a fruit"
        await asyncio.sleep(0.4)
        assert "Name a fruit" in page.value

    asyncio.run(type_and_press_enter())
    assert heard == ["Name a fruit"]


def test_the_box_shows_an_error_and_can_be_used_again():
    def answer(text, tuned):
        yield "so far"
        if text == "bad":
            raise ChatError("out of <memory>")

    message, send, _, page = parts(chat_box(answer))
    for text in ("bad", "good"):
        message.value = text
        send.click()
    assert "so far [out of &lt;memory&gt;]" in page.value
    assert not send.disabled
    assert "good" in page.value


def test_the_notebook_does_not_block_on_output_widgets():
    from pathlib import Path

    root = Path(__file__).parents[2]
    for path in ("llama_sft_helpers/evaluation/chat.py", "notebooks/07_evaluation.ipynb"):
        assert "Output()" not in (root / path).read_text(encoding="utf-8")
