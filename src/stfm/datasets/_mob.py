"""Mouse olfactory bulb on the 2k array: parser of the public files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm._errors import InputError
from stfm.datasets._fetch import fetch, sources
from stfm.datasets._st import assemble, read_counts, read_table

if TYPE_CHECKING:
    from anndata import AnnData

ANIMALS = {1: "animal_1", 2: "animal_1", 3: "animal_2"}


def mob(section: int = 1, *, image: bool = True) -> AnnData:
    """Mouse olfactory bulb, one section of spatial transcriptomics on the 2k array.

    The public table holds the whole array and 1000 preselected genes; the spots under tissue are returned. Sections 1
    and 2 are of one animal, section 3 of another.

    Parameters
    ----------
    section
        1, 2 or 3.
    image
        Whether to fetch the H&E (1905 x 1905 px).

    Returns
    -------
    AnnData:

    X
        Raw counts, float32 CSR ``(n, 1000)``, Ensembl ids with versions.
    obs
        ``array_row``, ``array_col``, ``library_id``, ``patient``, ``study``.
    obsm
        ``spatial``, float64 ``(n, 2)``, px; ``array``, measured array positions.
    uns
        ``spatial["MOB<section>"]``: scale factors with µm/px (from the lattice: the files state none) and the picture.

    Raises
    ------
    InputError
        No such section, or a file that cannot be fetched.
    DataIntegrityError
        A file with another sha256.

    References
    ----------
    Bergenstrahle et al., BMC Genomics 2020, doi:10.1186/s12864-020-06832-3.
    """
    try:
        patient = ANIMALS[int(section)]
    except (KeyError, ValueError) as error:
        raise InputError(f"section={section!r} is unknown; choose 1, 2 or 3") from error
    source = sources()["mob"]
    folder = "inst/extdata/counts"
    paths = [f"{folder}/MOB{section}.tsv", f"{folder}/alignment_table_MOB{section}.tsv", f"{folder}/MOB{section}.jpg"]
    local = fetch(source, paths if image else paths[:2])
    spots = read_table(local[1], ("x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"))
    spots = spots[spots["selected"] == 1]
    picture = local[2] if image else None
    adata = assemble(source, f"MOB{section}", spots, read_counts(local[0]), patient=patient, picture=picture)
    adata.var["gene_id"] = adata.var_names.to_numpy()
    return adata
