"""Talk to base and tuned model: the streamed answer, and the box that notebook 07 shows.

Alpaca's template has one instruction and one answer, so each message stands alone: there is no history.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import re
import threading
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.language import translate

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

# Escape sequences, then any other control character but line break and tab: a terminal would obey them.
_CONTROL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
Answer = Callable[[str, bool], Generator[str, None, None]]


class ChatError(RuntimeError):
    """The model could not answer; the message carries the cause."""


def stream_answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tuned: bool = True,
    max_new_tokens: int = 256,
) -> Generator[str, None, None]:
    """Generate an answer greedily and yield it piece by piece, until EOS or ``max_new_tokens``.

    Closing the iterator early stops the generation at its next token.

    Args:
        model: A ``PeftModel``.
        tokenizer: Its tokenizer.
        prompt: The whole prompt, template included.
        tuned: False switches the adapter off for this answer.
        max_new_tokens: Longest answer.

    Raises:
        ChatError: Generation failed.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, errors = threading.Event(), list[Exception]()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)

    def generate() -> None:
        try:
            with contextlib.nullcontext() if tuned else model.disable_adapter():
                model.generate(
                    **inputs,
                    streamer=streamer,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.eos_token_id,
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: closed.is_set()]),
                )
        except Exception as error:
            errors.append(error)
            streamer.end()

    worker = threading.Thread(target=generate, daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        worker.join()
    if errors:
        raise ChatError(f"The model could not answer: {errors[0]}") from errors[0]


def run_chat(answer: Answer, *, tuned: bool = True, prompt: str | None = None) -> None:
    """Talk in a terminal: a line is an instruction; ``/base``, ``/tuned`` and ``/quit`` are commands.

    Ctrl-C ends an answer, Ctrl-D or ``/quit`` the talk. ``tuned`` says whether the adapter is on at first;
    with a ``prompt``, this one instruction is answered and nothing is read.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    if prompt is not None:
        _print_answer(console, answer(prompt, tuned))
        return
    console.print("An instruction a line; /base and /tuned switch the adapter, /quit leaves.", style="dim")
    while True:
        try:
            text = console.input(f"[bold]{'tuned' if tuned else 'base'}>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text in ("/base", "/tuned"):
            tuned = text == "/tuned"
        elif text.startswith("/"):
            console.print("Commands: /base, /tuned, /quit.", style="dim")
        elif text:
            _print_answer(console, answer(text, tuned))


def _print_answer(console: Console, pieces: Generator[str, None, None]) -> None:
    try:
        for piece in pieces:
            console.print(_CONTROL.sub("", piece), end="", markup=False)
    except KeyboardInterrupt:
        console.print(" [stopped]", end="", markup=False)
    finally:
        pieces.close()
    console.print()


def chat_box(answer: Answer) -> Any:
    """An ``ipywidgets`` box with a text field, a base/tuned toggle, and the conversation.

    Nothing blocks: a message that is sent goes to ``answer``, with whether the tuned model is chosen.
    """
    import ipywidgets as widgets

    # Letter by letter, a text typed while the kernel is busy arrives cut off: the first letter, then Enter.
    message = widgets.Text(
        placeholder=translate("An instruction, then Enter"),
        continuous_update=False,
        layout=widgets.Layout(width="70%"),
    )
    choice = widgets.ToggleButtons(
        options=[(translate("tuned"), "tuned"), (translate("base"), "base")],
        layout=widgets.Layout(width="auto"),
    )
    send = widgets.Button(description=translate("Send"), button_style="primary")
    page = widgets.HTML()

    def respond(*_: object) -> None:
        text = message.value.strip()
        if not text or send.disabled:
            return
        send.disabled, message.value = True, ""
        said = f"{page.value}<p><b>{translate('you')}</b>: {html.escape(text)}</p><p><b>{choice.label}</b>: "
        page.value, reply = f"{said}…</p>", ""
        try:
            for piece in answer(text, choice.value == "tuned"):
                reply += piece
                page.value = said + _as_html(reply)
        except Exception as error:
            reply += f" [{error}]"
        finally:
            page.value = f"{said}{_as_html(reply)}</p>"
            send.disabled = False

    def on_enter(_widget: object, content: Mapping[str, Any], _buffers: object) -> None:
        # Enter is reported just before the text that it ends, so the answer waits a moment for that.
        if content.get("event") == "submit":
            asyncio.get_running_loop().call_later(0.2, respond)

    send.on_click(respond)
    message.on_msg(on_enter)
    return widgets.VBox([widgets.HBox([message, send]), choice, page])


def _as_html(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
