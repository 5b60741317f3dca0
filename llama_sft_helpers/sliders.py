"""Numbers to play with: ipywidgets' controls where somebody can move them, a still picture elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def interact(function: Callable[..., Any], **controls: Any) -> None:
    """Call ``ipywidgets.interact``; where nobody can move a slider, call the function once as it is.

    A notebook that is run without a reader (``llama-sft run``, nbmake) thus keeps what the function draws
    with its defaults, and pages and GitHub, which run no widgets, show that.

    Args:
        function: Draws, prints or returns something to look at. Each parameter has a default, at which its
            control starts.
        **controls: For each parameter a range such as ``(1, 8)``, with a third number for the step; a list of
            choices; or nothing, if the default tells: a text field or a box to tick. They are ipywidgets'
            own: https://ipywidgets.readthedocs.io/en/stable/examples/Using%20Interact.html.

    Raises:
        TypeError: A control has no parameter of its name.
    """
    import ipywidgets
    from IPython.display import display

    inspect.signature(function).bind(**controls)
    if _has_reader():
        ipywidgets.interact(function, **controls)
    elif (shown := function()) is not None:
        display(shown)


def _has_reader() -> bool:
    """Whether who sent the cell could answer ``input()``: JupyterLab, VS Code, Colab; a program could not."""
    from IPython import get_ipython

    request: dict[str, Any] = getattr(get_ipython(), "get_parent", dict)()  # without a kernel there is none
    return bool(request.get("content", {}).get("allow_stdin"))
