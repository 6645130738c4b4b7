"""HER2-positive breast cancer (Andersson et al. 2021): parser of the public files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stfm._validate import check_choice
from stfm.datasets._fetch import fetch, sources
from stfm.datasets._st import assemble, read_counts, read_table

if TYPE_CHECKING:
    from anndata import AnnData

_SPOTS = ("x", "y", "new_x", "new_y", "pixel_x", "pixel_y")


def her2st_sections() -> list[str]:
    """Return the names of the sections."""
    prefix = "data/ST-cnts/"
    return [path.removeprefix(prefix)[:2] for path in sources()["her2st"].files if path.startswith(prefix)]


def her2st(section: str = "C2", *, image: bool = True) -> AnnData:
    """HER2-positive breast cancer, one section of spatial transcriptomics.

    Files come from the public repository at one commit, are checked by sha256 and kept in ``settings.cache_dir``. H&E
    of full resolution exists for C2-C5 (patient C, consecutive sections) and B4 (patient B); a pathologist's labels for
    B1, C1, D1, E1, F1, G2 and H1.

    Parameters
    ----------
    section
        ``"B1"`` ... ``"H2"``: patient and number.
    image
        Whether to fetch the H&E, where there is one.

    Returns
    -------
    AnnData:

    X
        Raw counts, float32 CSR ``(n, ~15,000)``, gene symbols.
    obs
        ``array_row``, ``array_col``, ``library_id``, ``patient``, ``study``; ``label`` where there are labels. Its
        value ``"undetermined"`` is the pathologist's word for no class: leave those spots out of scores.
    obsm
        ``spatial``, float64 ``(n, 2)``, px of the full-resolution image; ``array``, measured array positions.
    uns
        ``spatial[section]``: scale factors with µm/px, a picture of at most 2000 px for plots, and in
        ``metadata["source_image_path"]`` the file of full resolution, which is read tile by tile.

    Raises
    ------
    InputError
        No such section, or a file that cannot be fetched.
    DataIntegrityError
        A file with another sha256.

    References
    ----------
    Andersson et al., Nature Communications 2021, doi:10.1038/s41467-021-26271-2.
    """
    check_choice("section", section, her2st_sections())
    source = sources()["her2st"]
    paths = [f"data/ST-cnts/{section}.tsv.gz", f"data/ST-spotfiles/{section}_selection.tsv"]
    picture = source.under(f"data/ST-imgs/{section[0]}/{section}/") if image else None
    labels = source.under(f"data/ST-pat/lbl/{section}_")
    local = dict(zip(wanted := [*paths, *(p for p in (picture, labels) if p)], fetch(source, wanted), strict=True))
    adata = assemble(
        source,
        section,
        read_table(local[paths[1]], _SPOTS),
        read_counts(local[paths[0]]),
        patient=section[0],
        picture=local[picture] if picture else None,
    )
    if labels:
        adata.obs["label"] = _labels(read_table(local[labels], ("x", "y", "label")), adata.obs_names)
    return adata


def _labels(table: pd.DataFrame, names: pd.Index) -> pd.Categorical:
    """Labels of spots: their table gives fractional array positions, rounded they are the spot's name."""
    table = table.dropna(subset=["x", "y"])
    spot = [f"{x}x{y}" for x, y in np.rint(table[["x", "y"]].to_numpy()).astype(int)]
    by_name = dict(zip(spot, table["label"].astype(str), strict=True))
    return pd.Categorical([by_name.get(name) for name in names])
