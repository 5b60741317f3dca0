"""Notebook 02: is there a token, whose is it, and does it open the model?

No call here waits longer than ``HUB_SECONDS`` for an answer of the hub, and no text made here holds a token:
at most its last four characters are shown. Tokens: https://huggingface.co/docs/hub/security-tokens; gated
models: https://huggingface.co/docs/hub/models-gated.
"""

from __future__ import annotations

import html
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

HUB_SECONDS = 8.0
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
REQUESTS_PAGE = "https://huggingface.co/settings/gated-repos"
STATUS_PAGE = "https://status.huggingface.co"

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the order in which huggingface_hub reads them
_COLAB_SECRET = "HF_TOKEN"  # noqa: S105 (the secret's name)
_colab_refused = False  # Colab asks at every look; after a no, huggingface_hub does not ask again either
_PLACES = {"env": "the environment", "cache": "the cache", "colab-secret": "Colab's secrets"}
_Result = TypeVar("_Result")

# reason -> (what is the case, page to open, what to do there); {repo} is the model, {detail} the hub's words
_REMEDIES = {
    "no-token": (
        "{repo} is gated, and no token was found",
        TOKENS_PAGE,
        "make a token of type Read, then log in above (or keep it as the Colab secret HF_TOKEN)",
    ),
    "invalid-token": (
        "the hub does not accept the token ({detail})",
        TOKENS_PAGE,
        "it is mistyped, expired or revoked: make a new one of type Read and log in again",
    ),
    "gated-not-accepted": (
        "this account has not accepted the licence of {repo}",
        "https://huggingface.co/{repo}",
        "fill in the form on the model's page while logged in with the same account",
    ),
    "gated-pending": (
        "the request for {repo} waits for its authors",
        REQUESTS_PAGE,
        "wait for their mail (Meta: mostly within hours); until then use SFT_PROFILE=cpu-demo, an open model",
    ),
    "gated-rejected": (
        "the authors of {repo} refused the request",
        REQUESTS_PAGE,
        "the decision is theirs; use SFT_PROFILE=cpu-demo, an open model",
    ),
    "token-lacks-gated-permission": (
        "the account may be allowed, but this fine-grained token may not read gated models",
        TOKENS_PAGE,
        "edit the token and tick 'Read access to contents of all public gated repos you can access'",
    ),
    "not-found": (
        "the hub shows no model {repo} to this account ({detail})",
        "https://huggingface.co/models?search={repo}",
        "check the spelling; a private model also needs a token of an account that may see it",
    ),
    "forbidden": (
        "the hub refuses access to {repo} ({detail})",
        "https://huggingface.co/{repo}",
        "read the notice on the model's page",
    ),
    "hub-unreachable": (
        "no useful answer from the hub ({detail})",
        STATUS_PAGE,
        "check the network, HF_ENDPOINT and proxies, and try again; nothing is known about the token yet",
    ),
}
REASONS = tuple(_REMEDIES)


class AccessError(ValueError):
    """A model cannot be downloaded, and why.

    Attributes:
        reason: One of ``REASONS``.
        repo_id: The model.
        page: The page to open.
        action: What to do there.
    """

    def __init__(self, reason: str, repo_id: str, detail: str = "") -> None:
        case, page, action = (text.format(repo=repo_id, detail=detail) for text in _REMEDIES[reason])
        super().__init__(f"{reason}: {case}.\nPage: {page}\nNext: {action}.")
        self.reason, self.repo_id, self.page, self.action = reason, repo_id, page, action


class FoundToken(NamedTuple):
    """A token and where it was found; its representation never shows the token.

    Attributes:
        token: The token's text, or None.
        source: ``env``, ``cache``, ``colab-secret`` or ``none``.
    """

    token: str | None
    source: str

    def __repr__(self) -> str:
        return f"FoundToken({mask(self.token)}, source={self.source!r})"


def find_token() -> FoundToken:
    """The token that ``huggingface_hub`` would use, and its source: env, then cache, then Colab's secret."""
    for source, look in (("env", _env_token), ("cache", _cached_token), ("colab-secret", _colab_token)):
        if token := look():
            return FoundToken(token, source)
    return FoundToken(None, "none")


def summarize_token_sources() -> pd.DataFrame:
    """Where a token may lie, what is there, and which one is used.

    Returns:
        Columns source, place, token (its last four characters at most), used.
    """
    import pandas as pd
    from huggingface_hub import constants

    used = find_token().source
    rows = [
        ("env", "environment variable HF_TOKEN", mask(_env_token())),
        ("cache", str(constants.HF_TOKEN_PATH), mask(_cached_token())),
        (
            "colab-secret",
            "key icon in Colab, secret HF_TOKEN",
            _colab_state(asked=used in ("none", "colab-secret")),
        ),
    ]
    table = [(source, place, shown, "yes" if source == used else "") for source, place, shown in rows]
    return pd.DataFrame(table, columns=["source", "place", "token", "used"])


def summarize_reasons(repo_id: str) -> pd.DataFrame:
    """Every reason that ``check_access`` tells apart: columns reason, case, page, action."""
    import pandas as pd

    rows = [
        (reason, *(text.format(repo=repo_id, detail="the hub's words") for text in texts))
        for reason, texts in _REMEDIES.items()
    ]
    return pd.DataFrame(rows, columns=["reason", "case", "page", "action"])


def mask(token: str | None) -> str:
    """``ends in …abcd``: a token's last four characters, and only if it is long enough to hide the rest."""
    if not token:
        return "none"
    return f"ends in …{token[-4:]}" if len(token) >= 16 else "present"


def check_access(repo_id: str, token: str | None = None) -> None:
    """Ask the hub, before a download of 16 GB, whether this token opens this model.

    A folder that exists is open. The call is ``huggingface_hub.auth_check``, given up after ``HUB_SECONDS``.

    Args:
        repo_id: The model, ``owner/name``, or a folder.
        token: Token to ask with; None takes what ``find_token`` finds.

    Raises:
        AccessError: The model is not open; ``reason`` is one of ``REASONS``, the message says what to do.
    """
    if Path(repo_id).is_dir():
        return
    token = token or find_token().token
    _check_shape(token, repo_id)
    _ask_hub(
        lambda api: _within(HUB_SECONDS, lambda: api.auth_check(repo_id, token=token or False), repo_id),
        repo_id,
        token,
    )


def check_token(token: str, repo_id: str = "") -> dict[str, Any]:
    """The hub's ``whoami`` answer for a token.

    Raises:
        AccessError: ``invalid-token`` or ``hub-unreachable``.
    """
    _check_shape(token, repo_id)
    with _client_timeout(HUB_SECONDS):
        answer: dict[str, Any] = _ask_hub(lambda api: api.whoami(token=token), repo_id, token)
    return answer


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
    button = widgets.Button(description="Log in", button_style="primary")
    status = widgets.HTML(_status(_describe(find_token()), "idle"))

    def submit(*_: Any) -> None:
        token, field.value = field.value.strip(), ""
        field.disabled = button.disabled = True
        status.value = _status("Asking the hub …", "busy")
        try:
            status.value = _status(*_log_in(token, repo_id, keep))
        finally:
            field.disabled = button.disabled = False

    button.on_click(submit)
    # Enter: the message that both generations of the field send; on_submit warns in 8 and observe also fires
    # when the field loses the focus.
    field.on_msg(lambda _widget, content, _buffers: submit() if content.get("event") == "submit" else None)
    link = f'<a href="{TOKENS_PAGE}" target="_blank" style="text-decoration:underline">settings page</a>'
    note = f"Make a token of type Read on the {link}, paste it, press Enter."
    return widgets.VBox([widgets.HTML(note), widgets.HBox([field, button]), status])


def use_token(model_id: str) -> Any:
    """Find the token for a model of the hub and give it to this session's ``huggingface_hub``.

    The token is the one of ``find_token``; Colab's secret is handed on as the environment variable
    ``HF_TOKEN``, for this session only. Then the hub is asked whether the model is open, as ``check_access``
    does. A folder needs no token: nothing is looked for or asked.

    Args:
        model_id: The model that the notebook will load, ``owner/name``, or a folder.

    Returns:
        A sentence, or, where the model does not open, the widget of ``login_widget`` with the reason in it.
    """
    global _colab_refused  # noqa: PLW0603
    if model_id.startswith("local:") or Path(model_id).is_dir():
        return "The model is a folder on this machine: no token is needed."
    _colab_refused = False  # the reader runs the cell again after granting access: ask again
    found = find_token()
    if found.source == "colab-secret" and found.token:
        os.environ["HF_TOKEN"] = found.token
    text, opens = _try_token(model_id, found)
    if opens:
        return text
    widget = login_widget(model_id)
    widget.children[-1].value = _status(text, "error")
    return widget


# --- The widget's parts and answers ---


def _try_token(model_id: str, found: FoundToken) -> tuple[str, bool]:
    """What the hub says to a token, and whether the notebook can go on with it."""
    here = f"Token from {_PLACES[found.source]} ({mask(found.token)})" if found.token else "No token found"
    if _colab_refused:
        here += "; this notebook may not read the secret HF_TOKEN: switch on 'Notebook access' under the key"
    try:
        check_access(model_id, found.token)
    except AccessError as error:
        # without an answer the files may still lie in the cache, and nothing is known against the token
        return f"{here}.\n{error}", error.reason == "hub-unreachable" and found.token is not None
    return f"{here}: {model_id} is open.", True


def _password_field() -> Any:
    """A password field whose text ipywidgets 8 does not send back to every front end (``echo_update``)."""
    import ipywidgets as widgets
    from traitlets import Unicode

    class _TokenField(widgets.Password):
        value = Unicode("").tag(sync=True, echo_update=False)

    return _TokenField(description="Token", placeholder="hf_…")


def _log_in(token: str, repo_id: str, keep: Callable[..., None]) -> tuple[str, str]:
    """Validate a token, keep it, and look whether it opens the model: the status line and its state."""
    if not token:
        return "Paste a token first.", "error"
    try:
        user = check_token(token, repo_id)
        _keep(token, keep)
    except AccessError as error:
        return str(error), "error"
    except Exception as error:  # a full disk, for instance: the reader must see it, and not the token
        return f"The token is valid but could not be kept: {_without(token, str(error))}", "error"
    role = user.get("auth", {}).get("accessToken", {}).get("role", "unknown")
    hello = f"Logged in as {user.get('name', 'unknown')} (permission: {role}; token {mask(token)})."
    try:
        check_access(repo_id, token)
    except AccessError as error:
        return f"{hello}\n{error}", "error"
    return f"{hello}\n{repo_id} is open to this account.", "ok"


def _keep(token: str, keep: Callable[..., None]) -> None:
    """Keep the token in the cache, where every library finds it, and let no older variable hide it."""
    older = {name: os.environ.pop(name) for name in _TOKEN_VARIABLES if name in os.environ}
    try:
        with _client_timeout(HUB_SECONDS):
            keep(token=token)
    except BaseException:
        os.environ.update(older)
        raise


def _describe(found: FoundToken) -> str:
    if not found.token:
        return "No token found. Cells that download a gated model need one; all others run without."
    return f"A token was found in {_PLACES[found.source]} ({mask(found.token)}). Another one replaces it."


def _status(text: str, state: str) -> str:
    color = {"ok": "#00694e", "error": "#a33d00"}.get(state, "inherit")
    shown = html.escape(text).replace("\n", "<br>")
    return f'<span role="status" aria-live="polite" data-state="{state}" style="color:{color}">{shown}</span>'


# --- Where tokens lie ---


def _env_token() -> str | None:
    return next((token for name in _TOKEN_VARIABLES if (token := _clean(os.environ.get(name)))), None)


def _cached_token() -> str | None:
    from huggingface_hub import constants

    try:
        return _clean(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _colab_token() -> str | None:
    """The Colab secret; None if it is missing, refused, or this is not Colab."""
    global _colab_refused  # noqa: PLW0603
    if _colab_refused or not (userdata := _colab_userdata()):
        return None
    try:
        return _clean(userdata.get(_COLAB_SECRET))
    except Exception as error:  # refused, missing, or no browser to ask: a token typed below serves as well
        _colab_refused = type(error).__name__ == "NotebookAccessError"
        return None


def _colab_userdata() -> Any:
    if "google.colab" not in sys.modules:
        return None
    try:
        from google.colab import userdata
    except ImportError:
        return None
    return userdata


def _colab_state(*, asked: bool) -> str:
    if not _colab_userdata():
        return "not on Colab"
    if not asked:
        return "not asked"
    token = _colab_token()
    if _colab_refused:
        return "refused: allow it under the key icon, then restart the session"
    return mask(token)


def _clean(token: str | None) -> str | None:
    return (token or "").replace("\r", "").replace("\n", "").strip() or None


def _without(token: str, text: str) -> str:
    return text.replace(token, "…")


# --- Asking the hub ---


def _check_shape(token: str | None, repo_id: str) -> None:
    """Refuse what cannot be a token before an HTTP library quotes it in an error message."""
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise AccessError("invalid-token", repo_id, "it holds spaces or characters that no token has")


def _ask_hub(call: Callable[[HfApi], _Result], repo_id: str, token: str | None) -> _Result:
    """Make one call to the hub and turn what goes wrong into an ``AccessError``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    client = sys.modules[HTTPError.__module__]  # httpx with huggingface_hub 1.x, httpx2 with 2.x
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=False)
    try:
        return call(api)
    except AccessError:
        raise
    except HFValidationError:
        raise AccessError("not-found", repo_id, "not of the form owner/name") from None
    except HfHubHTTPError as error:
        raise _explain(error, repo_id, token) from None
    except OfflineModeIsEnabled:
        raise AccessError("hub-unreachable", repo_id, "HF_HUB_OFFLINE is set: unset it") from None
    # ImportError: a SOCKS proxy without its package
    except (client.HTTPError, client.InvalidURL, ImportError, OSError, ValueError) as error:
        detail = f"{type(error).__name__} at {api.endpoint}"
        raise AccessError("hub-unreachable", repo_id, detail) from None


def _explain(error: HfHubHTTPError, repo_id: str, token: str | None) -> AccessError:
    """From the answer's status and the hub's own error headers, not from the exception's class.

    ``huggingface_hub`` reports an expired token as RepositoryNotFoundError.
    """
    status = error.response.status_code
    code, message = (error.response.headers.get(name, "") for name in ("X-Error-Code", "X-Error-Message"))
    detail = f"HTTP {status}" + (f", {message}" if message else "")
    return AccessError(
        _reason(status, code, message.lower(), bool(token)), repo_id, _without(token or "\0", detail)
    )


def _reason(status: int, code: str, message: str, has_token: bool) -> str:
    if status == 429 or status >= 500:
        return "hub-unreachable"
    if "fine-grained" in message:
        return "token-lacks-gated-permission"
    if status == 401 and has_token:
        return "invalid-token"
    if code == "GatedRepo":
        waits, refused = "awaiting" in message or "pending" in message, "rejected" in message
        granted = "gated-pending" if waits else "gated-rejected" if refused else "gated-not-accepted"
        return granted if has_token else "no-token"
    if code == "RepoNotFound" or status == 404:
        return "not-found"
    return "no-token" if status == 401 else "forbidden"


def _within(seconds: float, call: Callable[[], _Result], repo_id: str) -> _Result:
    """Run a call in a thread and give it up after some seconds: a name look-up has no time-out of its own."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise AccessError("hub-unreachable", repo_id, f"no answer in {seconds:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


@contextmanager
def _client_timeout(seconds: float) -> Iterator[None]:
    """Give the hub client, which waits for ever by default, a time-out.

    For ``whoami`` and ``login``, which may ask for Colab's secret: that works in the main thread only.
    """
    from huggingface_hub import get_session

    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before
