"""Public data sets: fetching by hash from a local server, and parsing that agrees with independently built objects."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from PIL import Image

import stfm as sf
from stfm.datasets._fetch import Source, fetch, sources
from stfm.datasets._st import small_picture
from stfm.errors import DataIntegrityError, InputError, MissingKeyError

CONTENT = b"one file"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        """Say nothing."""


@pytest.fixture
def serve():
    """Serve a folder on this machine; yields a function that starts a server and returns its address."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(_Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def source() -> Source:
    files = {"data/a.tsv": hashlib.sha256(CONTENT).hexdigest()}
    return Source("tiny", "t", "http://127.0.0.1:1/nothing", "o/r", "c", "human", "ST", "MIT", "", files)


def _home(folder: Path, content: bytes = CONTENT) -> Path:
    """Write what a mirror of the tiny data set holds."""
    path = folder / "mirror" / "tiny" / "data" / "a.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return folder / "mirror"


def test_fetch_through_a_mirror_then_from_the_cache(tmp_path, source, serve):
    mirror = serve(_home(tmp_path))
    with sf.settings.override(cache_dir=tmp_path / "cache", offline=False, mirror=mirror + "/"):
        (path,) = fetch(source, source.files)
    assert path == tmp_path / "cache" / "tiny" / "data" / "a.tsv"
    assert path.read_bytes() == CONTENT
    with sf.settings.override(cache_dir=tmp_path / "cache", offline=True):
        assert fetch(source, source.files) == [path]


def test_offline_names_the_file_and_the_way_to_get_it(tmp_path, source):
    with (
        sf.settings.override(cache_dir=tmp_path / "cache", offline=True),
        pytest.raises(InputError, match=r"a\.tsv is not in the cache and STFM_OFFLINE is set.*http://"),
    ):
        fetch(source, source.files)


def test_what_comes_with_a_wrong_hash_is_refused_and_not_kept(tmp_path, source, serve):
    mirror = serve(_home(tmp_path, b"another file"))
    with (
        sf.settings.override(cache_dir=tmp_path / "cache", offline=False, mirror=mirror),
        pytest.raises(DataIntegrityError, match="not the file that is meant.*STFM_MIRROR"),
    ):
        fetch(source, source.files)
    assert not [path for path in (tmp_path / "cache" / "tiny").rglob("*") if path.is_file()]


def test_a_damaged_file_is_fetched_again_or_refused_offline(tmp_path, source, serve):
    mirror = serve(_home(tmp_path))
    bad = tmp_path / "cache" / "tiny" / "data" / "a.tsv"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(CONTENT[:-2])
    with (
        sf.settings.override(cache_dir=tmp_path / "cache", offline=True),
        pytest.raises(DataIntegrityError, match=r"a\.tsv is damaged.*delete it"),
    ):
        fetch(source, source.files)
    with sf.settings.override(cache_dir=tmp_path / "cache", offline=False, mirror=mirror):
        (path,) = fetch(source, source.files)
    assert path.read_bytes() == CONTENT


def test_no_server_is_told_in_one_line(tmp_path, source):
    with (
        sf.settings.override(cache_dir=tmp_path / "cache", offline=False),
        pytest.raises(InputError, match="could not fetch http://127.0.0.1:1/nothing/data/a.tsv.*check the network"),
    ):
        fetch(source, source.files)


def test_a_missing_file_on_the_server_is_told(tmp_path, source, serve):
    with (
        sf.settings.override(cache_dir=tmp_path / "cache", offline=False, mirror=serve(tmp_path)),
        pytest.raises(InputError, match="could not fetch .*404"),
    ):
        fetch(source, source.files)


def test_table_of_files_is_complete():
    table = sources()
    assert len(table["her2st"].files) == 46
    assert len(table["mob"].files) == 10
    for source in table.values():
        assert source.commit in source.url
        assert all(len(value) == 64 for value in source.files.values())
    assert table["her2st"].under("data/ST-imgs/C/C4/") == "data/ST-imgs/C/C4/5714_HE_BT_D2.jpg"
    assert table["her2st"].under("data/ST-imgs/A/A1/") is None


def test_table_of_files_is_that_of_the_public_repositories(shared_data):
    listed = dict(reversed(line.split()) for line in (shared_data / "cache.sha256").read_text().splitlines())
    for source in sources().values():
        for path, sha256 in source.files.items():
            assert listed[f"{source.name}/{path}"] == sha256


def test_list_and_load():
    table = sf.datasets.list_datasets()
    assert len(table) == 1 + 17 + 3
    assert table.loc["her2st:C2", "image"]
    assert not table.loc["her2st:B1", "image"]
    assert table.loc["her2st:B1", "labels"]
    assert table.loc["mob:3", "patient"] == "animal_2"
    assert sf.datasets.load("toy", n_spots=5, image=False).n_obs == 5
    with pytest.raises(MissingKeyError, match="There is no data set 'her2st:C9'. Did you mean"):
        sf.datasets.load("her2st:C9")


def test_unknown_sections():
    with pytest.raises(InputError, match="section='A1' is unknown"):
        sf.datasets.her2st("A1")
    with pytest.raises(InputError, match="choose 1, 2 or 3"):
        sf.datasets.mob(4)


def test_small_picture(tmp_path):
    pixels = np.zeros((2600, 3000, 3), dtype=np.uint8)
    pixels[:, 1500:] = 200
    Image.fromarray(pixels).save(tmp_path / "big.jpg", quality=95)
    shown, scale = small_picture(tmp_path / "big.jpg")
    assert shown.shape == (1733, 2000, 3)
    assert scale == pytest.approx(2 / 3)
    assert shown[:, 1010:].mean() == pytest.approx(200, abs=2)
    Image.fromarray(pixels[:50, 1480:1520]).save(tmp_path / "small.png")
    shown, scale = small_picture(tmp_path / "small.png")
    assert shown.shape == (50, 40, 3)
    assert scale == 1.0


@pytest.mark.parametrize(
    ("stored", "name"),
    [("her2st_C2", "her2st:C2"), ("her2st_B4", "her2st:B4"), ("her2st_G2", "her2st:G2"), ("mob_1", "mob:1")],
)
def test_parsers_agree_with_independent_objects(shared_data, stored, name):
    expected = ad.read_h5ad(shared_data / "h5ad" / f"{stored}.h5ad")
    with sf.settings.override(cache_dir=shared_data / "cache"):
        found = sf.datasets.load(name)
    assert list(found.obs_names) == list(expected.obs_names)
    assert list(found.var_names) == list(expected.var_names)
    assert found.X.dtype == np.float32
    assert found.X.shape == expected.X.shape
    assert (found.X != expected.X).nnz == 0
    for key in expected.obsm:
        np.testing.assert_array_equal(found.obsm[key], expected.obsm[key])
    for key in expected.obs:
        assert found.obs[key].astype(str).tolist() == expected.obs[key].astype(str).tolist()


def test_her2st_has_picture_scale_and_origin(shared_data):
    with sf.settings.override(cache_dir=shared_data / "cache"):
        adata = sf.datasets.her2st("C3")
        bare = sf.datasets.her2st("E1")
    entry = adata.uns["spatial"]["C3"]
    shown, factors = entry["images"]["hires"], entry["scalefactors"]
    assert max(shown.shape) == 2000
    assert 0.68 < factors["microns_per_pixel"] < 0.70
    assert (adata.obsm["spatial"] * factors["tissue_hires_scalef"] < shown.shape[1::-1]).all()
    full = Path(entry["metadata"]["source_image_path"])
    assert full == shared_data / "cache/her2st/data/ST-imgs/C/C3/5714_HE_BT_D1.jpg"
    spots = (adata.obsm["spatial"] * factors["tissue_hires_scalef"]).astype(int)
    assert shown[spots[:, 1], spots[:, 0]].mean() < shown[:40].mean() - 15  # spots lie on tissue, the border does not
    assert adata.obs["patient"].unique().tolist() == ["C"]
    assert "images" not in bare.uns["spatial"]["E1"]
    assert bare.obs["label"].nunique() == 4


def test_mob_is_tissue_only(shared_data):
    with sf.settings.override(cache_dir=shared_data / "cache"):
        sections = [sf.datasets.mob(number) for number in (1, 2, 3)]
    assert [adata.n_obs for adata in sections] == [379, 407, 438]
    (slide,) = sf.slide.as_slides(sections[2])
    assert slide.panel.species == "mouse"
    assert slide.mpp == pytest.approx(4.4, abs=0.05)
    assert slide.patient == "animal_2"


def test_public_section_through_a_mirror(shared_data, serve, tmp_path):
    with sf.settings.override(cache_dir=tmp_path, offline=False, mirror=serve(shared_data / "cache")):
        adata = sf.datasets.her2st("B1")
    assert adata.shape == (295, 15109)
    assert (tmp_path / "her2st/data/ST-cnts/B1.tsv.gz").is_file()


@pytest.mark.internet
def test_public_section_from_its_home(tmp_path):
    with sf.settings.override(cache_dir=tmp_path, offline=False, mirror=None):
        assert sf.datasets.mob(1).n_obs == 379
