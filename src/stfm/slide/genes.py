"""Gene panels and model vocabularies: the genes that a slide measured, and those that a model knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stfm._errors import InputError, MissingKeyError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Panel", "Species", "Vocabulary", "detect_species"]

Species = Literal["human", "mouse"]

_ENSEMBL = re.compile(r"^ENS([A-Z]{3})?G\d{6,}(\.\d+)?$", re.IGNORECASE)
_GENOME_PREFIX = re.compile(r"^(?:GRCh3[78]|hg19|hg38|GRCm3[89]|mm10|mm39)[_-]+", re.IGNORECASE)
_TITLE_CASE = re.compile(r"^(?:mt-)?[A-Z0-9][a-z0-9.\-]*[a-z][A-Za-z0-9.\-]*$")
_OPEN_READING_FRAME = re.compile(r"^(C(?:\d+|X|Y))orf(\d+)")

SYMBOL_COLUMNS = (
    "gene_symbols", "gene_symbol", "symbols", "symbol", "gene_names", "gene_name", "feature_name", "gene_short_name",
    "gene", "genes", "hgnc_symbol", "mgi_symbol", "external_gene_name", "name",
)  # fmt: skip
ID_COLUMNS = (
    "gene_ids", "gene_id", "ensembl_ids", "ensembl_id", "ensembl", "ensembl_gene_id", "feature_id", "ensemblid", "id",
)  # fmt: skip


def _strings(values: Iterable[Any]) -> NDArray[np.str_]:
    return np.array([str(value) for value in values], dtype=np.str_)


def id_key(name: str) -> str:
    """Ensembl id without version, upper-cased; empty where the name is no Ensembl id."""
    bare = _GENOME_PREFIX.sub("", name.strip())
    return bare.partition(".")[0].upper() if _ENSEMBL.match(bare) else ""


def symbol_key(name: str) -> str:
    """Upper-cased symbol without a genome prefix; empty for Ensembl ids and missing values."""
    bare = _GENOME_PREFIX.sub("", name.strip())
    return "" if _ENSEMBL.match(bare) or bare.lower() in {"", "nan", "none"} else bare.upper()


def first_places(keys: Sequence[str]) -> dict[str, int]:
    """Return where each key that is not empty stands first."""
    return {key: i for i, key in reversed(list(enumerate(keys))) if key}


def ensembl_share(names: Sequence[str] | NDArray[np.str_]) -> float:
    """Share of the names that are Ensembl gene ids."""
    return float(np.mean([bool(id_key(str(name))) for name in names])) if len(names) else 0.0


def detect_species(names: Sequence[str] | NDArray[np.str_]) -> Species | None:
    """Tell human from mouse by Ensembl prefix (ENSG, ENSMUSG) or by the case of the symbols.

    Parameters
    ----------
    names
        Symbols or Ensembl ids.

    Returns
    -------
    ``"human"``, ``"mouse"``, or ``None`` where more than a third of the names speak against either.
    """
    votes: Counter[str] = Counter()
    for raw in names:
        name = _GENOME_PREFIX.sub("", str(raw).strip())
        match = _ENSEMBL.match(name)
        if match:
            votes[{None: "human", "MUS": "mouse"}.get(match[1] and match[1].upper(), "other")] += 1
            continue
        plain = _OPEN_READING_FRAME.sub(r"\1ORF\2", name)
        if sum(letter.isalpha() for letter in plain) < 2:
            continue
        if plain == plain.upper():
            votes["human"] += 1
        else:
            votes["mouse" if _TITLE_CASE.match(plain) else "other"] += 1
    total = votes.total()
    if votes["human"] > total * 2 / 3:
        return "human"
    return "mouse" if votes["mouse"] > total * 2 / 3 else None


@dataclass(frozen=True)
class Panel:
    """Genes that a slide measured, in the order of the columns of its counts.

    Attributes
    ----------
    names
        Names as the data give them (``var_names``).
    ids
        Ensembl ids, where known.
    species
        ``"human"``, ``"mouse"`` or ``None`` (not known).
    symbols
        Gene symbols, where the names are something else (Ensembl ids) and symbols are known.
    """

    names: NDArray[np.str_]
    ids: NDArray[np.str_] | None = None
    species: Species | None = None
    symbols: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", _strings(self.names))
        for name in ("ids", "symbols"):
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, _strings(value))
            if len(value) != len(self.names):
                raise InputError(f"Panel has {len(self.names)} names but {len(value)} {name}; give one a gene")
        if self.species is None:
            object.__setattr__(self, "species", detect_species(self.names))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.names)

    @cached_property
    def id_keys(self) -> list[str]:
        """Normalised Ensembl id a gene, empty where unknown."""
        return [id_key(name) for name in (self.names if self.ids is None else self.ids)]

    @cached_property
    def symbol_keys(self) -> list[str]:
        """Normalised symbol a gene, empty where unknown."""
        return [symbol_key(name) for name in (self.names if self.symbols is None else self.symbols)]

    @classmethod
    def from_var(cls, var: pd.DataFrame, *, var_key: str | None = None, species: Species | None = None) -> Panel:
        """Panel of a table of genes (``adata.var``): names from the index, ids and symbols from known columns.

        Parameters
        ----------
        var
            Table with one row a gene.
        var_key
            Column that holds the symbols or Ensembl ids to match by. ``None`` looks for one under the usual names
            (``gene_ids``, ``gene_symbols``, ``feature_name`` ...), whose content must look the part.
        species
            Species, where it should not be told from the names.
        """
        names = _strings(var.index)
        if var_key is not None:
            if var_key not in var.columns:
                have = ", ".join(map(str, var.columns)) or "none"
                raise MissingKeyError(f"var_key='{var_key}' is no column of var (columns: {have})")
            values = _strings(var[var_key])
            is_id = ensembl_share(values) > 0.5
            return cls(names, values if is_id else None, species or detect_species(values), None if is_id else values)
        by_lower = {str(column).lower(): column for column in var.columns}
        ids = symbols = None
        if ensembl_share(names) > 0.5:
            for column in SYMBOL_COLUMNS:
                if column in by_lower:
                    values = _strings(var[by_lower[column]])
                    if ensembl_share(values) < 0.5 and not all(value.isdigit() for value in values):
                        symbols = values
                        break
        else:
            for column in ID_COLUMNS:
                if column in by_lower:
                    values = _strings(var[by_lower[column]])
                    if ensembl_share(values) > 0.5:
                        ids = values
                        break
        return cls(names, ids, species, symbols)


@dataclass(frozen=True)
class Vocabulary:
    """Genes that a model knows, in the order of its inputs and outputs. Names are unique up to case.

    Attributes
    ----------
    names
        Symbols (or Ensembl ids), spelled as the model gives them back.
    ids
        Ensembl ids, where known ("" for single unknown ones).
    species
        ``"human"``, ``"mouse"`` or ``None``.
    orthologues
        Ensembl ids of the same genes in another species, where known ("" for single unknown ones), so that a mouse
        panel of Ensembl ids meets a human vocabulary.
    """

    names: NDArray[np.str_]
    ids: NDArray[np.str_] | None = None
    species: Species | None = None
    orthologues: NDArray[np.str_] | None = None
    _panel: Panel = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        panel = Panel(self.names, self.ids, self.species)
        if len(panel) == 0:
            raise InputError("a vocabulary needs at least one gene")
        doubles = [key for key, n in Counter(name.upper() for name in panel.names).items() if n > 1]
        if doubles:
            raise InputError(f"vocabulary names must be unique up to case; twice or more: {', '.join(doubles[:5])}")
        for name in ("names", "ids", "species"):
            object.__setattr__(self, name, getattr(panel, name))
        object.__setattr__(self, "_panel", panel)
        if self.orthologues is not None:
            object.__setattr__(self, "orthologues", _strings(self.orthologues))
            if len(self.orthologues) != len(panel):
                raise InputError(f"the vocabulary has {len(panel)} names but {len(self.orthologues)} orthologues")

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        pairs = ((self.names, other.names), (self.ids, other.ids), (self.orthologues, other.orthologues))
        return self.species == other.species and all(
            mine is theirs if mine is None or theirs is None else np.array_equal(mine, theirs) for mine, theirs in pairs
        )

    def __hash__(self) -> int:
        return hash((tuple(self.names), self.species))

    @property
    def panel(self) -> Panel:
        """The vocabulary seen as a panel, with its matching keys cached."""
        return self._panel

    @cached_property
    def orthologue_keys(self) -> list[str]:
        """Normalised Ensembl id of the orthologue a gene, empty where unknown."""
        return [] if self.orthologues is None else [id_key(name) for name in self.orthologues]

    def find(self, genes: Iterable[str]) -> list[int | None]:
        """Return where genes stand by name, Ensembl id or that of their orthologue; None where they do not."""
        routes = ([str(name).upper() for name in self.names], self.panel.id_keys, self.orthologue_keys)
        by_name, *by_id = (first_places(keys) for keys in routes)
        places = {key: place for found in reversed(by_id) for key, place in found.items()}
        return [by_name.get(gene.upper(), places.get(id_key(gene))) for gene in genes]

    @classmethod
    def from_panels(cls, panels: Iterable[Panel], *, mode: Literal["union", "intersection"] = "union") -> Vocabulary:
        """Vocabulary of several panels; a gene is one entry when it shares an Ensembl id or a symbol.

        Parameters
        ----------
        panels
            Panels of the slides that a model is to be trained on.
        mode
            ``"union"`` keeps every gene, in order of first appearance; ``"intersection"`` those of every panel.
        """
        if mode not in ("union", "intersection"):
            raise InputError(f"mode='{mode}' is unknown; choose 'union' or 'intersection'")
        panels = list(panels)
        if not panels:
            raise InputError("a vocabulary needs at least one panel")
        known: dict[str, int] = {}
        names: list[str] = []
        ids: list[str] = []
        seen: list[set[int]] = []
        for number, panel in enumerate(panels):
            shown = panel.names if panel.symbols is None else panel.symbols
            keys = zip(panel.names, shown, panel.id_keys, panel.symbol_keys, strict=True)
            for name, symbol, by_id, by_symbol in keys:
                aliases = [key for key in (by_id, by_symbol) if key] or [str(name).upper()]
                entry = next((known[key] for key in aliases if key in known), None)
                if entry is None:
                    entry = len(names)
                    names.append(str(symbol) if by_symbol else str(name))
                    ids.append(by_id)
                    seen.append(set())
                ids[entry] = ids[entry] or by_id
                seen[entry].add(number)
                for key in aliases:
                    known.setdefault(key, entry)
        kept = [i for i in range(len(names)) if mode == "union" or len(seen[i]) == len(panels)]
        if not kept:
            raise InputError(f"the {len(panels)} panels share no gene; use mode='union' or check their gene names")
        some_ids = any(ids[i] and ids[i] != names[i].upper() for i in kept)
        species = {panel.species for panel in panels if panel.species is not None}
        return cls(
            _strings(names[i] for i in kept),
            _strings(ids[i] for i in kept) if some_ids else None,
            species.pop() if len(species) == 1 else None,
        )

    def save(self, path: str | Path) -> None:
        """Write ``genes.txt``: a species line, then a gene a line (name, Ensembl id, orthologue's; tabs between)."""
        columns = [column for column in (self.ids, self.orthologues) if column is not None]
        if self.ids is None and self.orthologues is not None:
            columns.insert(0, np.full(len(self), "", dtype=np.str_))
        lines = [f"# species: {self.species or 'unknown'}"]
        lines += ["\t".join(map(str, row)).rstrip() for row in zip(self.names, *columns, strict=True)]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what :meth:`save` wrote, or any text file with one gene a line."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no gene list at {path}; a model folder holds it as genes.txt")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        notes = [line.removeprefix("# species:").strip() for line in lines if line.startswith("# species:")]
        rows = [[*line.split("\t"), "", ""] for line in lines if not line.startswith("#")]
        names, ids, orthologues = ([row[i].strip() for row in rows] for i in range(3))
        species: Species | None = "human" if "human" in notes else "mouse" if "mouse" in notes else None
        others = _strings(orthologues) if any(orthologues) else None
        return cls(_strings(names), _strings(ids) if any(ids) else None, species, others)
