"""The streamed answer, the terminal and the box."""

import asyncio
import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_sft_helpers import cli
from llama_sft_helpers.data import to_prompt_completion
from llama_sft_helpers.evaluation import ChatError, chat_box, run_chat, stream_answer

PROMPT = "### Instruction:\nName a fruit.\n\n### Response:\n"


def stream(trained, prompt=PROMPT, **options):
    return stream_answer(trained.model, trained.tokenizer, prompt, **options)


@contextlib.contextmanager
def says(trained, *words):
    """A model whose logits are replaced by these token ids, one after the other; then it says token 0."""
    left = iter(words)

    def say_next(*_):
        return torch.nn.functional.one_hot(torch.full((1, 1), next(left, 0)), len(trained.tokenizer)).float()

    hook = trained.model.get_output_embeddings().register_forward_hook(say_next)
    try:
        yield
    finally:
        hook.remove()


def test_pieces_add_up_to_what_generate_gives_and_the_adapter_is_on_again(trained):
    def by_generate():
        batch = trained.tokenizer(PROMPT, return_tensors="pt")
        ids = trained.model.generate(**batch, do_sample=False, pad_token_id=0, max_new_tokens=20)
        return trained.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    tuned = by_generate()
    with trained.model.disable_adapter():
        base = by_generate()
    said = ["".join(stream(trained, tuned=on, max_new_tokens=20)) for on in (True, False, True)]
    assert said == [tuned, base, tuned]
    assert base != tuned


def test_text_comes_in_pieces_before_the_end_and_stops_at_eos(trained):
    text = "one two three four five six"
    words = trained.tokenizer(text, add_special_tokens=False).input_ids
    with says(trained, *words, trained.tokenizer.eos_token_id):
        pieces = list(stream(trained))
    assert "".join(pieces) == text
    assert len(pieces) > 2


def test_closing_early_ends_the_generation(trained):
    steps = []
    with says(trained, *trained.tokenizer("one two three").input_ids):
        hook = trained.model.get_output_embeddings().register_forward_pre_hook(lambda *_: steps.append(1))
        pieces = stream(trained, max_new_tokens=1500)
        next(pieces)
        pieces.close()
        hook.remove()
    assert 0 < len(steps) < 1000


def test_an_error_while_generating_reaches_the_caller(trained):
    def fail(*_):
        raise RuntimeError("out of luck")

    hook = trained.model.get_output_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(ChatError, match="out of luck"):
            list(stream(trained))
    finally:
        hook.remove()


# --- The terminal ---


def echo(text, tuned):
    yield f"{'T' if tuned else 'B'}:"
    yield text + " [bold]x[/bold]"


@pytest.fixture
def talk(monkeypatch, capsys):
    """What a talk prints, for the lines that are typed."""

    def say(lines, answer=echo, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        run_chat(answer, **options)
        return capsys.readouterr().out

    return say


def test_commands_switch_and_leave(talk):
    out = talk("one\n/base\ntwo :warning:\n\n/tuned\nthree\n/help\n/quit\nfour\n")
    for expected in ("T:one [bold]x[/bold]", "B:two :warning:", "T:three", "Commands: /base, /tuned, /quit."):
        assert expected in out
    assert "four" not in out


def test_control_characters_of_an_answer_do_not_reach_the_terminal(talk):
    sent = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]8;;x\x1b\\b\x1bc\x07\b\r\x00\x7f\x9b2J\tc\nd \u00e9"
    out = talk("go", lambda text, tuned: (piece for piece in (sent, "split \x1b", "[2Jend")))
    assert "aredb2J c\nd \u00e9split [2Jend" in out  # rich makes a tab a space


def test_the_end_of_the_input_leaves_and_a_prompt_answers_once(talk):
    assert "B:one" in talk("one", tuned=False)
    assert talk("ignored", prompt="just this") == "T:just this [bold]x[/bold]\n"


def test_ctrl_c_ends_an_answer_not_the_talk(talk):
    def interrupted(text, tuned):
        yield "begun"
        if text == "long":
            raise KeyboardInterrupt
        yield " and done"

    out = talk("long\nshort\n", interrupted)
    assert "begun [stopped]" in out
    assert "begun and done" in out


def test_the_command_answers_and_explains(trained, chat_command):
    program = [sys.executable, "-m", "llama_sft_helpers.cli", "chat", str(trained.adapter)]
    program += ["--prompt", "Name a fruit.", "--max-new-tokens", "12"]
    good = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (good.returncode, good.stderr) == (0, "")  # no line a product, no progress bars
    prompt = to_prompt_completion({"instruction": "Name a fruit.", "output": "-"})["prompt"]
    assert good.stdout == "".join(stream(trained, prompt, max_new_tokens=12)) + "\n"
    bad = chat_command(trained.folder / "none")
    assert bad.exit_code == 1
    assert "Run notebook 06 first" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_the_command_computes_in_float32_without_a_gpu_whatever_the_files_hold(trained, tiny_model, tmp_path):
    tiny_model.bfloat16().save_pretrained(tmp_path / "tiny-llama")
    model, _ = cli._load_adapter(trained.adapter, str(tmp_path / "tiny-llama"))
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


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
    for chosen, text in (("tuned", "<i>hi</i>"), ("base", "again"), ("base", "")):
        choice.value, message.value = chosen, text
        send.click()  # an empty message does nothing
    assert "ok" not in seen[0]
    assert len(seen) == 4
    assert message.value == ""
    first, second = page.value.split("again")
    assert "&lt;i&gt;hi&lt;/i&gt;" in first
    assert "True&lt;b&gt;Trueok" in first
    assert "Falseok" in second


def test_enter_sends_the_text_that_arrives_just_after_it():
    """The browser reports the key first and the text second; a field left without Enter sends nothing."""
    heard = []

    def answer(text, tuned):
        heard.append(text)
        yield "ok"

    async def type_and_press_enter():
        message, *_ = parts(chat_box(answer))
        message.value = "Nam"
        await asyncio.sleep(0.3)
        assert heard == []
        enter = {"method": "custom", "content": {"event": "submit"}}
        message._handle_msg({"content": {"data": enter}, "buffers": []})
        message.value = "Name a fruit"
        await asyncio.sleep(0.4)

    asyncio.run(type_and_press_enter())
    assert heard == ["Name a fruit"]


def test_the_box_shows_an_error_and_can_be_used_again():
    def answer(text, tuned):
        yield f"so far {text}"
        if text == "bad":
            raise ChatError("out of <memory>")

    message, send, _, page = parts(chat_box(answer))
    for text in ("bad", "good"):
        message.value = text
        send.click()
    assert "so far bad [out of &lt;memory&gt;]" in page.value
    assert "so far good" in page.value


def test_the_notebook_does_not_block_on_output_widgets():
    root = Path(__file__).parents[2]
    for path in ("llama_sft_helpers/evaluation/chat.py", "notebooks/07_evaluation.ipynb"):
        assert "Output()" not in (root / path).read_text(encoding="utf-8")
