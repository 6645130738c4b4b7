"""The table of data sets, and loading one by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stfm._registry import Registry

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@dataclass(frozen=True)
class DatasetSpec:
    """One section that can be loaded by name."""

    name: str
    title: str
    species: str
    platform: str
    patient: str
    image: bool
    labels: bool
    licence: str
    reference: str
    source: str
    load: Callable[..., AnnData]


def _fill() -> None:
    from stfm.datasets._fetch import sources
    from stfm.datasets._her2st import her2st, her2st_sections
    from stfm.datasets._mob import ANIMALS, mob
    from stfm.datasets._toy import toy

    DATASETS.register(
        "toy",
        DatasetSpec("toy", "simulated tumour", "human", "Visium", "", True, True, "BSD-3-Clause", "", "stfm", toy),
    )
    for name, sections, loader in (
        ("her2st", her2st_sections(), her2st),
        ("mob", [str(number) for number in ANIMALS], mob),
    ):
        source = sources()[name]
        for section in sections:
            key = f"{name}:{section}"
            spec = DatasetSpec(
                name=key,
                title=source.title,
                species=source.species,
                platform=source.platform,
                patient=section[0] if name == "her2st" else ANIMALS[int(section)],
                image=name == "mob" or source.under(f"data/ST-imgs/{section[0]}/{section}/") is not None,
                labels=source.under(f"data/ST-pat/lbl/{section}_") is not None,
                licence=source.licence,
                reference=source.reference,
                source=f"{source.repository} @ {source.commit}",
                load=_bound(loader, section if name == "her2st" else int(section)),
            )
            DATASETS.register(key, spec)


def _bound(loader: Callable[..., AnnData], section: Any) -> Callable[..., AnnData]:
    def load(**arguments: Any) -> AnnData:
        return loader(section, **arguments)

    return load


DATASETS: Registry[DatasetSpec] = Registry("data set", entry_points_group="stfm.datasets", loader=_fill)


def list_datasets() -> pd.DataFrame:
    """List the data sets.

    Returns
    -------
    DataFrame with a row a section: title, species, platform, patient, picture, labels, licence, reference and source.

    Examples
    --------
    >>> import stfm as sf
    >>> bool(sf.datasets.list_datasets().loc["her2st:C2", "image"])
    True
    """
    return DATASETS.frame()


def load(name: str, **arguments: Any) -> AnnData:
    """Load a data set by its name in :func:`list_datasets`, such as ``"her2st:C2"``.

    Parameters
    ----------
    name
        Row of :func:`list_datasets`.
    arguments
        Passed to the loader (:func:`toy`, :func:`her2st`, :func:`mob`).

    Returns
    -------
    What the loader returns.

    Raises
    ------
    MissingKeyError
        No such data set; the message names the nearest.
    """
    return DATASETS.get(name).load(**arguments)
