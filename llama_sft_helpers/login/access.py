"""Does a token open a model? No call here waits longer than ``HUB_SECONDS`` for an answer of the hub."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_sft_helpers.core.language import translate
from llama_sft_helpers.core.waiting import within
from llama_sft_helpers.login.tokens import find_token

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

HUB_SECONDS = 8.0
TOKENS_PAGE = "https://huggingface.co/settings/tokens"

_Result = TypeVar("_Result")
_REMEDIES: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_name("reasons.toml").read_text(encoding="utf-8")
)


class AccessError(ValueError):
    """A model cannot be downloaded; ``reason`` is one of ``summarize_reasons``, the message has the fix."""

    def __init__(self, reason: str, repo_id: str, detail: str = "") -> None:
        self.reason = reason
        case, page, action = _filled(reason, repo_id, detail)
        super().__init__(f"{reason}: {case}.\n{translate('Page')}: {page}\n{translate('Next')}: {action}.")


def _filled(reason: str, repo_id: str, detail: str) -> list[str]:
    return [translate(text, repo=repo_id, detail=detail) for text in _REMEDIES[reason].values()]


def summarize_reasons(repo_id: str) -> pd.DataFrame:
    """Every reason that ``check_access`` tells apart: columns reason, case, page, action."""
    import pandas as pd

    rows = [(reason, *_filled(reason, repo_id, "… the hub's message …")) for reason in _REMEDIES]
    return pd.DataFrame(rows, columns=["reason", "case", "page", "action"])


def check_access(repo_id: str, token: str | None = None) -> None:
    """Ask the hub, before a download of 16 GB, whether this token opens this model.

    A folder that exists is open. The call is ``huggingface_hub.auth_check``, given up after ``HUB_SECONDS``.

    Args:
        repo_id: The model, ``owner/name``, or a folder.
        token: Token to ask with; None takes what ``find_token`` finds.

    Raises:
        AccessError: The model is not open.
    """
    if Path(repo_id).is_dir():
        return
    token = token or find_token().token
    _ask_hub(lambda api: api.auth_check(repo_id, token=token or False), repo_id, token)


def check_token(token: str, repo_id: str) -> dict[str, Any]:
    """The hub's ``whoami`` answer for a token, or an ``AccessError``."""
    return _ask_hub(lambda api: api.whoami(token=token), repo_id, token)


def _ask_hub(call: Callable[[HfApi], _Result], repo_id: str, token: str | None) -> _Result:
    """Make one call to the hub and turn what goes wrong into an ``AccessError``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    # What cannot be a token is refused before an HTTP library quotes it in an error message.
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise AccessError(
            "invalid-token", repo_id, translate("it holds spaces or characters that no token has")
        )
    client = sys.modules[HTTPError.__module__]  # httpx with huggingface_hub 1.x, httpx2 with 2.x
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=False)
    try:
        return within(HUB_SECONDS, lambda: call(api))
    except HFValidationError:
        raise AccessError("not-found", repo_id, translate("not of the form owner/name")) from None
    except HfHubHTTPError as error:
        raise _explain(error, repo_id, token) from None
    except OfflineModeIsEnabled:
        raise AccessError("hub-unreachable", repo_id, translate("HF_HUB_OFFLINE is set: unset it")) from None
    except TimeoutError as error:
        raise AccessError("hub-unreachable", repo_id, str(error)) from None
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
    reason = classify_answer(status, code, message, bool(token))
    return AccessError(reason, repo_id, detail.replace(token or "\0", "…"))


def classify_answer(status: int, code: str, message: str, has_token: bool) -> str:
    """The reason, one of ``summarize_reasons``, behind an answer of the hub that is no yes.

    Args:
        status: The HTTP status.
        code: The header ``X-Error-Code``, or "".
        message: The header ``X-Error-Message``, or "".
        has_token: Whether a token was sent along.
    """
    message = message.lower()
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
