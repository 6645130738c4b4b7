"""One registry for models, encoders, datasets, protocols and platforms."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from stfm._errors import InputError, MissingKeyError
from stfm._validate import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pandas as pd

T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> frozen specs.

    Parameters
    ----------
    kind
        What is registered, as the error messages call it (``"model"``).
    entry_points_group
        Group under which other packages offer entries: each entry point is a function that takes the registry.
    loader
        Called once, before the first look-up, to register the entries of stfm itself.
    """

    def __init__(
        self,
        kind: str,
        *,
        entry_points_group: str | None = None,
        loader: Callable[[], None] | None = None,
    ) -> None:
        self.kind = kind
        self._specs: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._group = entry_points_group
        self._loader = loader
        self._loaded = False

    def register(self, name: str, spec: T, *, aliases: Iterable[str] = ()) -> T:
        """Add a spec under a name; a name that is taken is refused."""
        for key in (name, *aliases):
            if key in self._specs or key in self._aliases:
                msg = f"{self.kind} {key!r} is registered already; choose another name."
                raise InputError(msg)
        self._specs[name] = spec
        self._aliases.update(dict.fromkeys(aliases, name))
        return spec

    def get(self, name: str) -> T:
        """Return the spec of a name or alias."""
        self._load()
        key = self._aliases.get(name, name)
        if key not in self._specs:
            msg = f"There is no {self.kind} {name!r}. {did_you_mean(str(name), [*self._specs, *self._aliases])}"
            raise MissingKeyError(msg)
        return self._specs[key]

    def names(self) -> list[str]:
        """Return all names (without aliases) in the order of registration."""
        self._load()
        return list(self._specs)

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._specs or name in self._aliases

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter(self._specs.values())

    def frame(self) -> pd.DataFrame:
        """Return a table: a row a name, a column a field of the specs (callables left out)."""
        import pandas as pd

        self._load()
        rows = {}
        for name, spec in self._specs.items():
            if not is_dataclass(spec):
                rows[name] = {"spec": spec}
                continue
            row = {f.name: getattr(spec, f.name) for f in fields(spec)}
            rows[name] = {k: v for k, v in row.items() if not callable(v) and k != "name"}
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.index.name = self.kind
        return table

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first, since the loader itself looks names up
        if self._loader is not None:
            self._loader()
        if self._group is not None:
            for point in entry_points(group=self._group):
                point.load()(self)
