"""Lazy public names (PEP 562), so that ``import stfm`` stays light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a package.

    Parameters
    ----------
    package
        ``__name__`` of the package.
    names
        Public name -> submodule that defines it. A submodule that is public itself maps to ``""``.
    """
    public = sorted(names)

    def __getattr__(name: str) -> Any:
        if name not in names:
            msg = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(msg)
        if names[name] == "":
            return import_module(f"{package}.{name}")
        return getattr(import_module(f"{package}.{names[name]}"), name)

    def __dir__() -> list[str]:
        return public

    return __getattr__, __dir__, public
