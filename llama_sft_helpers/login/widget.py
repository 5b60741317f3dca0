"""The log-in: a widget that never blocks, and the one call that a notebook needs of it."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.language import translate
from llama_sft_helpers.login import access, tokens
from llama_sft_helpers.login.access import TOKENS_PAGE, AccessError, check_access, check_token
from llama_sft_helpers.login.tokens import PLACES, TOKEN_VARIABLES, FoundToken, find_token, mask


def login_widget(repo_id: str, login: Callable[..., None] | None = None) -> Any:
    """A password field, a button and a status line; shows at once and never blocks the cells below.

    Works in ipywidgets 7.7 (Colab) and 8 (JupyterLab). The field is emptied before the hub is asked. After a
    good log-in the status line also says whether the account opens ``repo_id``.

    Args:
        repo_id: The model the log-in is for.
        login: Called with ``token=`` to keep a valid token; default ``huggingface_hub.login``.

    Returns:
        An ``ipywidgets.VBox``.
    """
    import huggingface_hub
    import ipywidgets as widgets

    keep = login or huggingface_hub.login
    field = _password_field()
    button = widgets.Button(description=translate("Log in"), button_style="primary")
    status = widgets.HTML(_status(_describe(find_token()), "idle"))

    def submit(*_: object) -> None:
        token, field.value = field.value.strip(), ""
        field.disabled = button.disabled = True
        status.value = _status(translate("Asking the hub …"), "busy")
        try:
            status.value = _status(*_log_in(token, repo_id, keep))
        finally:
            field.disabled = button.disabled = False

    button.on_click(submit)
    # Enter: the message that both generations of the field send; on_submit warns in 8 and observe also fires
    # when the field loses the focus.
    field.on_msg(lambda _widget, content, _buffers: submit() if content.get("event") == "submit" else None)
    link = f'<a href="{TOKENS_PAGE}" target="_blank" style="text-decoration:underline">'
    link += f"{translate('settings page')}</a>"
    note = translate("Make a token of type Read on the {link}, paste it, press Enter.", link=link)
    return widgets.VBox([widgets.HTML(note), widgets.HBox([field, button]), status])


def use_token(model_id: str) -> Any:
    """Find the token for a model of the hub and give it to this session's ``huggingface_hub``.

    The token is the one of ``find_token``, and the hub is asked whether it opens the model, as
    ``check_access`` does. If so, Colab's secret is handed on as the environment variable ``HF_TOKEN``, for
    this session only. A folder needs no token, nor does a model that is built here: nothing is looked for or
    asked.

    Args:
        model_id: The model that the notebook will load, ``owner/name``, a folder, or ``local:name`` (as
            ``read_profile`` leaves it).

    Returns:
        A sentence, or, where the model does not open, the widget of ``login_widget`` with the reason in it.
    """
    if model_id.startswith("local:"):
        return translate("The model is built on this machine: no token is needed.")
    if Path(model_id).is_dir():
        return translate("The model is a folder on this machine: no token is needed.")
    tokens.colab_refused = False  # the reader may have granted access since the last look
    found = find_token()
    text, opens = _try_token(model_id, found)
    if opens:  # a secret that opens nothing is looked up again: the reader may have replaced it
        if found.source == "colab-secret" and found.token:
            os.environ["HF_TOKEN"] = found.token
        return text
    widget = login_widget(model_id)
    widget.children[-1].value = _status(text, "error")
    return widget


def _try_token(model_id: str, found: FoundToken) -> tuple[str, bool]:
    """What the hub says to a token, and whether the notebook can go on with it."""
    here = translate("No token found")
    if found.token:
        place = translate(PLACES[found.source])
        here = translate("Token from {place} ({token})", place=place, token=mask(found.token))
    if tokens.colab_refused:
        here += "; " + translate(
            "this notebook may not read the secret HF_TOKEN: switch on 'Notebook access' under the key"
        )
    try:
        check_access(model_id, found.token)
    except AccessError as error:
        # without an answer the files may still lie in the cache, and nothing is known against the token
        return f"{here}.\n{error}", error.reason == "hub-unreachable" and found.token is not None
    return f"{here}: " + translate("{model} is open.", model=model_id), True


def _password_field() -> Any:
    """A password field whose text ipywidgets 8 does not send back to every front end (``echo_update``)."""
    import ipywidgets as widgets
    from traitlets import Unicode

    class _TokenField(widgets.Password):
        value = Unicode("").tag(sync=True, echo_update=False)

    return _TokenField(description=translate("Token"), placeholder="hf_…")


def _log_in(token: str, repo_id: str, keep: Callable[..., None]) -> tuple[str, str]:
    """Validate a token, keep it, and look whether it opens the model: the status line and its state."""
    if not token:
        return translate("Paste a token first."), "error"
    try:
        user = check_token(token, repo_id)
        _keep(token, keep)
    except AccessError as error:
        return str(error), "error"
    except Exception as error:  # a full disk, for instance: the reader must see it, and not the token
        fault = str(error).replace(token, "…")
        return translate("The token is valid but could not be kept: {fault}", fault=fault), "error"
    role = user.get("auth", {}).get("accessToken", {}).get("role", "unknown")
    hello = translate(
        "Logged in as {user} (permission: {role}; token {token}).",
        user=user.get("name", "unknown"),
        role=role,
        token=mask(token),
    )
    try:
        check_access(repo_id, token)
    except AccessError as error:
        return f"{hello}\n{error}", "error"
    return f"{hello}\n" + translate("{model} is open to this account.", model=repo_id), "ok"


def _keep(token: str, keep: Callable[..., None]) -> None:
    """Keep the token in the cache, where every library finds it, and let no older variable hide it."""
    from huggingface_hub import get_session

    older = {name: os.environ.pop(name) for name in TOKEN_VARIABLES if name in os.environ}
    session = get_session()
    before, session.timeout = session.timeout, access.HUB_SECONDS  # by default the client waits for ever
    try:
        keep(token=token)  # in this thread: it may ask for Colab's secret, which works in the main one only
    except BaseException:
        os.environ.update(older)
        raise
    finally:
        session.timeout = before


def _describe(found: FoundToken) -> str:
    if not found.token:
        return translate(
            "No token found. Cells that download a gated model need one; all others run without."
        )
    return translate(
        "A token was found in {place} ({token}). Another one replaces it.",
        place=translate(PLACES[found.source]),
        token=mask(found.token),
    )


def _status(text: str, state: str) -> str:
    color = {"ok": "#00694e", "error": "#a33d00"}.get(state, "inherit")
    shown = html.escape(text).replace("\n", "<br>")
    return f'<span role="status" aria-live="polite" data-state="{state}" style="color:{color}">{shown}</span>'
