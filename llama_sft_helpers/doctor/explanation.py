"""What broke, why, and what to do next: a sentence under the traceback instead of the traceback alone.

``explain`` reads the exception; the table of known failures is in ``table``. In a notebook
``%load_ext llama_sft_helpers`` shows cause and fix under every traceback that is known, and leaves the
traceback as it is.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import html
import importlib.metadata
import importlib.util
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.doctor.table import RENAMED_ARGUMENTS, TABLE, Failure, Sign

if TYPE_CHECKING:
    from llama_sft_helpers.profiles import Profile

_MAX_CHAIN = 20
_MAX_MESSAGE = 20_000
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{4,}")
_WATCHED = (
    "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub", "tokenizers",
    "safetensors", "pyarrow", "numpy", "torch",
)  # fmt: skip
_UNKNOWN = {
    "place": "", "wanted": "some memory", "plan": "", "change": "Take a smaller profile.",
    "repo": "the model", "page": "the model's page on huggingface.co",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A known failure's cause and the next action.

    Attributes:
        key: The entry in the doctor's table.
        title: The failure in one line.
        cause: Why it happened.
        fix: What to do next.
        link: The library's own page or thread.
    """

    key: str
    title: str
    cause: str
    fix: str
    link: str

    def __str__(self) -> str:
        return f"{self.title}\n  Cause: {self.cause}\n  Fix:   {self.fix}\n  See:   {self.link}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        title, cause, fix, link = (
            html.escape(text) for text in (self.title, self.cause, self.fix, self.link)
        )
        fix = re.sub(r"`([^`]+)`", r"<code>\1</code>", fix)
        return (
            '<div style="border-left:4px solid #0072B2;padding:0.3em 0.8em;max-width:48em">'
            f"<b>{title}</b><br>Cause: {cause}<br>Fix: {fix}<br>"
            f'<a href="{link}" rel="noopener" target="_blank">{link}</a></div>'
        )


def explain(exception: object, *, config: Any = None, profile: Profile | None = None) -> Explanation | None:
    """Explain a failure, if it is a known one; never raises.

    The exception's causes are read too, and so are warnings (``peft`` only warns of a merge into 8-bit
    weights) and ``nbclient``'s report of a failed cell.

    Args:
        exception: What was raised.
        config: The model's configuration, for the memory plan of a CUDA out-of-memory error; None looks for a
            model in the traceback's frames, then at the profile.
        profile: The profile of the run; None takes the one that ``load_profile`` would.

    Returns:
        Cause, fix and a link, or None if the failure is not known.
    """
    try:
        own, handled = _chain(exception)
        context = _Context(config, profile)
        found = _first_match(own, context, TABLE)
        if not found:
            return _explanation(*known) if (known := _first_match(handled, context, TABLE)) else None
        before = TABLE[: TABLE.index(found[0])]
        more_telling = [failure for failure in before if failure.section == found[0].section]
        return _explanation(*(_first_match(handled, context, more_telling) or found))
    except Exception:  # the doctor must not add a failure to the one it is asked about
        return None


# --- Matching ---


@dataclasses.dataclass(frozen=True)
class _Case:
    """What is known of one exception; from its text alone when it was raised in another process."""

    names: frozenset[str]
    message: str
    where: str
    exception: BaseException | None

    @classmethod
    def of(cls, exception: BaseException) -> _Case:
        ename = getattr(exception, "ename", None)
        if isinstance(ename, str) and hasattr(exception, "evalue"):  # nbclient's CellExecutionError
            kind = getattr(builtins, ename, None)
            mro = kind.__mro__ if isinstance(kind, type) else ()
            names = frozenset({ename, "Exception", *(c.__name__ for c in mro)})
            text = _clipped(getattr(exception, "traceback", ""))
            return cls(names, _clipped(exception.evalue), _frames_of_text(text), None)
        return cls(
            frozenset(c.__name__ for c in type(exception).__mro__),
            _clipped(exception),
            "\n".join(f"{file}:{function}" for file, function in _frames(exception)),
            exception,
        )


@dataclasses.dataclass
class _Context:
    config: Any
    profile: Profile | None


def _chain(exception: object) -> tuple[list[_Case], list[_Case]]:
    """The exception with its explicit causes, and those that were being handled when it was raised."""
    own: list[_Case] = []
    handled: list[_Case] = []
    seen: set[int] = set()
    queue: list[tuple[object, list[_Case]]] = [(exception, own)]
    while queue and len(seen) < _MAX_CHAIN:
        current, found = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        found.append(_Case.of(current))
        if isinstance(current, BaseExceptionGroup):
            queue += [(part, found) for part in current.exceptions]
        queue.append((current.__cause__, found))
        if not current.__suppress_context__:
            queue.append((current.__context__, handled))
    return own, handled


def _first_match(
    cases: list[_Case], context: _Context, failures: Sequence[Failure]
) -> tuple[Failure, dict[str, str]] | None:
    for failure in failures:
        for case in cases:
            for sign in failure.signs:
                values = _match(sign, case, context)
                if values is not None:
                    return failure, values
    return None


def _match(sign: Sign, case: _Case, context: _Context) -> dict[str, str] | None:
    if not case.names & set(sign.raised.split("|")):
        return None
    found = re.search(sign.message, case.message, re.DOTALL)
    if not found or (sign.where and not re.search(sign.where, case.where)):
        return None
    values = {name: text for name, text in found.groupdict().items() if text}
    if sign.look:
        seen = _LOOKS[sign.look](case, context, values)
        if seen is None:
            return None
        values |= seen
    return _surroundings(case) | values


def _explanation(failure: Failure, values: Mapping[str, str]) -> Explanation:
    def filled(text: str) -> str:
        known = _UNKNOWN | dict(values)
        text = re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], "?"), text)
        return re.sub(r"\s+", " ", _TOKEN.sub("hf_…", text)).strip()

    return Explanation(failure.key, failure.title, filled(failure.cause), filled(failure.fix), failure.link)


def _clipped(value: object) -> str:
    try:
        text = str(value)
    except Exception:
        return ""
    return text[:_MAX_MESSAGE]


def _frames(exception: BaseException) -> Iterator[tuple[str, str]]:
    for frame, _ in traceback.walk_tb(exception.__traceback__):
        yield frame.f_code.co_filename, frame.f_code.co_name


def _frames_of_text(text: str) -> str:
    """``file:function`` lines from a traceback as IPython prints it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    pattern = r"(?:File )?([^\s:]+\.py):\d+,? in ([\w.]+)"
    return "\n".join(f"{file}:{name.split('.')[-1]}" for file, name in re.findall(pattern, plain))


# --- Looks at the surroundings ---


def _surroundings(case: _Case) -> dict[str, str]:
    values = {"torch": _version("torch")}
    if name := getattr(case.exception, "filename", None):
        values["place"] = f" at {name}"
    if repo := re.search(r"(?:huggingface\.co/|/models/|model )([\w.-]+/[\w.-]+)", case.message):
        repo_id = re.sub(r"\.$", "", repo[1]).removesuffix("/resolve")
        if not repo_id.startswith(("docs/", "settings/", "api/")):
            values |= {"repo": repo_id, "page": f"https://huggingface.co/{repo_id}"}
    return values


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def _stale(package: str) -> dict[str, str] | None:
    """The package's two versions, if the one in memory is not the one on disk."""
    from llama_sft_helpers.environment import same_version

    loaded = getattr(sys.modules.get(package), "__version__", None)
    if not isinstance(loaded, str):
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        on_disk = importlib.metadata.version(package)
        if not same_version(loaded, on_disk):
            return {"package": package, "loaded": loaded, "on_disk": on_disk}
    return None


def _stale_package(case: _Case, context: _Context, values: dict[str, str]) -> dict[str, str] | None:
    if case.exception is None:  # raised in another process: this one's packages say nothing
        return None
    named = (
        package
        for package in _WATCHED
        if re.search(rf"\b{package}\b", case.message) or f"/{package}/" in case.where
    )
    return next((stale for package in named if (stale := _stale(package))), None)


def _stale_numpy(case: _Case, context: _Context, values: dict[str, str]) -> dict[str, str] | None:
    return _stale("numpy") if case.exception is not None else None


def _unseen_bitsandbytes(case: _Case, context: _Context, values: dict[str, str]) -> dict[str, str] | None:
    """By now bitsandbytes is installed, but transformers looked for it before and remembers the answer."""
    if case.exception is None or not importlib.util.find_spec("bitsandbytes"):
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        on_disk = importlib.metadata.version("bitsandbytes")
        return {"package": "bitsandbytes", "loaded": "not installed", "on_disk": on_disk}
    return None


def _renamed_argument(case: _Case, context: _Context, values: dict[str, str]) -> dict[str, str] | None:
    owner, old = values["owner"], values["old"]
    if new := RENAMED_ARGUMENTS.get(old):
        return {"advice": f"Use {new}."}
    known = next(
        (
            getattr(module, owner)
            for name in ("trl", "transformers", "peft")
            if (module := sys.modules.get(name)) and hasattr(module, owner)
        ),
        None,
    )
    if known is None:
        return None
    import difflib
    import inspect

    near = difflib.get_close_matches(old, inspect.signature(known).parameters, n=1, cutoff=0.6)
    return {"advice": f"The nearest of its arguments is {near[0]}." if near else f"See help({owner})."}


def _memory_plan(case: _Case, context: _Context, values: dict[str, str]) -> dict[str, str] | None:
    """The plan's largest item, and the mildest change that makes the plan smaller."""
    with contextlib.suppress(Exception):
        from llama_sft_helpers.memory.plan import plan_memory, smaller_profiles
        from llama_sft_helpers.profiles import read_profile

        profile = context.profile or read_profile()
        config = context.config or _config_in(case.exception) or _config_of(profile.model_id)
        if config is None:
            return {}
        plan = plan_memory(config, profile)
        largest = plan.loc[plan["gib"].idxmax()]
        total = float(plan["gib"].sum())
        text = (
            f"The plan for profile {profile.name} is {total:.2f} GiB; its largest item is "
            f"{largest['component']}: {largest['gib']:.2f} GiB ({largest['how']})."
        )
        for change, smaller in smaller_profiles(profile):
            needed = float(plan_memory(config, smaller)["gib"].sum())
            if needed < 0.9 * total:
                return {"plan": text, "change": f"Set {change}: planned {needed:.2f} GiB instead."}
        return {"plan": text}
    return {}


def _config_in(exception: BaseException | None) -> Any:
    """The configuration of a model that stands in the traceback's frames."""
    if exception is None:
        return None
    for frame, _ in traceback.walk_tb(exception.__traceback__):
        for value in list(frame.f_locals.values()):
            for owner in (value, getattr(value, "model", None)):
                config = getattr(owner, "config", None)
                if hasattr(config, "num_hidden_layers") and hasattr(config, "intermediate_size"):
                    return config
    return None


def _config_of(model_id: str) -> Any:
    from llama_sft_helpers.core.llama import is_llama3, load_llama3_config

    return load_llama3_config() if is_llama3(model_id, "8B") else None


_LOOKS: dict[str, Callable[[_Case, _Context, dict[str, str]], dict[str, str] | None]] = {
    "stale_package": _stale_package,
    "stale_numpy": _stale_numpy,
    "unseen_bitsandbytes": _unseen_bitsandbytes,
    "renamed_argument": _renamed_argument,
    "memory_plan": _memory_plan,
}


# --- In a notebook ---

_showwarning_before: Callable[..., None] | None = None


def attach(shell: Any) -> None:
    """Show cause and fix under tracebacks and warnings that are known; the traceback itself stays.

    Args:
        shell: The IPython shell. See https://ipython.readthedocs.io/en/stable/config/callbacks.html.
    """
    global _showwarning_before  # noqa: PLW0603 (warnings has one hook for the process)
    detach(shell)
    shell.events.register("post_run_cell", _after_cell)
    _showwarning_before = warnings.showwarning
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def detach(shell: Any) -> None:
    """Undo ``attach``."""
    global _showwarning_before  # noqa: PLW0603
    with contextlib.suppress(ValueError):  # not registered
        shell.events.unregister("post_run_cell", _after_cell)
    if _showwarning_before and warnings.showwarning is _show_warning:
        warnings.showwarning = _showwarning_before
    _showwarning_before = None


def _after_cell(result: Any) -> None:
    _show(getattr(result, "error_in_exec", None) or getattr(result, "error_before_exec", None))


def _show_warning(message: Warning | str, *arguments: Any, **keywords: Any) -> None:
    if _showwarning_before:
        _showwarning_before(message, *arguments, **keywords)
    _show(message)


def _show(exception: object) -> None:
    explanation = explain(exception)
    if explanation:
        from IPython.display import display

        display(explanation)
