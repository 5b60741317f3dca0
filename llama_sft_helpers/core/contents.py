"""A package's table of contents: its public names, each loaded when it is asked for (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def load_on_demand(
    package: str, contents: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``, so that importing it imports none of its modules.

    Args:
        package: The package's ``__name__``.
        contents: Public name -> the module in the package that defines it; a module of ``core``, which no
            notebook imports, is named ``core.files``.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in contents:
            raise AttributeError(
                f"{package} has no {name!r}; it offers {', '.join(sorted(contents))}.", name=name
            )
        module = contents[name]
        start = package.partition(".")[0] if module.startswith("core.") else package
        return getattr(importlib.import_module(f"{start}.{module}"), name)

    return __getattr__, lambda: sorted(contents)
