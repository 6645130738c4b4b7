"""Weights by name, path, address and hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import stfm as sf
from stfm.errors import DataIntegrityError, InputError, MissingDependencyError, MissingKeyError
from stfm.weights.registry import WEIGHTS, WeightsSpec


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_table_is_whole():
    table = sf.weights.list_weights()
    assert table.loc["default", "source"] == "packaged"
    assert {"summary", "kind", "version", "size", "licence", "gated", "card", "there"} <= set(table.columns)
    for spec in WEIGHTS:
        assert spec.packaged or (spec.urls and spec.files), f"{spec.name} is nowhere, or has no sha256"
        assert spec.licence != "not stated", spec.name


def test_packaged_weights_are_the_listed_ones():
    """What is in the wheel is what the table says: each file listed, none damaged, sizes right."""
    for spec in WEIGHTS:
        folder = spec.packaged_folder
        if folder is None or not folder.is_dir():
            continue
        assert set(sf.weights.verify(spec.name)["state"]) == {"ok"}
        assert spec.size == sum(file.stat().st_size for file in folder.iterdir())
        assert spec.size < 40e6, "the wheel stays small"


def test_tables_of_genes_are_read_by_their_name(shared_data, cache):
    from stfm.encoders.gene._tables import read_table

    for name, file in (("scgpt-genes", "scgpt_gene_vocab.json"), ("scfoundation-genes", None)):
        (listed,) = WEIGHTS.get(name).files
        found = shared_data.parent / "weights" / "genes" / (file or listed)
        if not found.is_file():
            pytest.skip(f"{found} is not there")
        place = cache / "weights" / name / listed
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, place)
        assert sf.weights.verify(name)["state"].tolist() == ["ok"]
        assert place.stat().st_size == WEIGHTS.get(name).size
    assert len(read_table("scgpt-genes")) == 48292
    assert len(read_table("scfoundation-genes")) == 19264


@pytest.mark.internet
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["scgpt-genes", "scfoundation-genes"])
def test_public_files_are_where_the_table_says(name):
    assert sf.weights.fetch(name).stat().st_size == WEIGHTS.get(name).size


@pytest.fixture
def remote(row, home, sha256):
    """Return a file with a row of its own."""
    return row("remote", kind="encoder", urls=(f"{home.url}/base",), files={"w.bin": sha256}, licence="MIT")


@pytest.mark.usefixtures("remote")
def test_a_name_is_fetched_once(home, cache):
    with pytest.raises(InputError, match="'remote' are not on this machine; sf.weights.fetch"):
        sf.weights.path("remote")
    assert not sf.weights.list_weights().loc["remote", "there"]
    path = sf.weights.fetch("remote")
    assert path == cache / "weights" / "remote" / "w.bin"
    assert sf.weights.fetch("remote") == sf.weights.path("remote") == sf.weights.locate("remote") == path
    assert [request["path"] for request in home.gets] == ["/base/w.bin"]
    assert sf.weights.list_weights().loc["remote", "there"]


def test_several_files_are_a_folder(row, home, cache, sha256):
    row("two", urls=(home.url,), files={"a/x.bin": sha256, "y.bin": sha256})
    folder = sf.weights.fetch("two")
    assert folder == cache / "weights" / "two"
    assert (folder / "a" / "x.bin").read_bytes() == (folder / "y.bin").read_bytes() == home.content


@pytest.mark.usefixtures("remote")
def test_verify_says_what_is_what(cache):
    def states() -> list[str]:
        return sf.weights.verify("remote")["state"].tolist()

    assert states() == ["absent"]
    path = sf.weights.fetch("remote")
    assert states() == ["ok"]
    path.write_bytes(b"damaged")
    assert states() == ["damaged"]
    everything = sf.weights.verify()
    assert {"default", "remote"} <= set(everything["weights"])
    assert everything.columns.tolist() == ["weights", "file", "state", "path"]
    assert sf.weights.fetch("remote").stat().st_size > 10
    assert states() == ["ok"]


@pytest.mark.usefixtures("remote")
def test_a_mirror_stands_in_for_the_publisher(home, cache):
    with sf.settings.override(mirror=f"{home.url}/mirror/"):
        sf.weights.fetch("remote")
        sf.weights.locate("https://publisher.example/x/y.bin")
        sf.weights.locate("hub:owner/repo/z.bin")
    assert [request["path"] for request in home.gets] == [
        "/mirror/weights/remote/w.bin",
        "/mirror/weights/url/publisher.example/x/y.bin",
        "/mirror/weights/hub/owner/repo/z.bin",
    ]


def test_addresses_are_tried_in_turn(row, home, cache, sha256):
    row("twice", urls=("http://127.0.0.1:1", "hub:o/r", home.url), files={"w.bin": sha256})
    with sf.settings.override(mirror=None), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert sf.weights.fetch("twice").read_bytes() == home.content
    row("never", urls=("http://127.0.0.1:1", "http://127.0.0.1:2"), files={"w.bin": sha256})
    with pytest.raises(InputError, match="could not fetch http://127.0.0.1:2/w.bin"):
        sf.weights.fetch("never")


@pytest.mark.usefixtures("remote", "cache")
@pytest.mark.parametrize("place", ["remote/w.bin", "w.bin"])
def test_a_folder_of_ones_own_comes_first(place, home, tmp_path, monkeypatch):
    own = tmp_path / "own"
    (own / place).parent.mkdir(parents=True)
    (own / place).write_bytes(home.content)
    monkeypatch.setenv("STFM_WEIGHTS", str(own))
    with sf.settings.override(offline=True):
        assert sf.weights.fetch("remote") == sf.weights.path("remote") == own / place
        (own / place).write_bytes(b"another")
        damaged = place == "remote/w.bin"  # under a name that others use, too, it is another file
        assert sf.weights.verify("remote")["state"].tolist() == ["damaged" if damaged else "absent"]
        error, said = (DataIntegrityError, r"own.*is not the file") if damaged else (InputError, "STFM_OFFLINE is set")
        with pytest.raises(error, match=said):
            sf.weights.fetch("remote")
    assert home.asked == []


@pytest.mark.usefixtures("cache")
def test_files_from_the_hub_and_addresses_in_a_folder_of_ones_own(tmp_path):
    for key in ("hub/owner/repo/a.bin", "url/publisher.example/b.bin"):
        (tmp_path / "own" / key).parent.mkdir(parents=True)
        (tmp_path / "own" / key).write_bytes(b"1")
    with sf.settings.override(weights_dir=tmp_path / "own", offline=True):
        assert sf.weights.locate("hub:owner/repo/a.bin", sha256=_hash(b"1")).read_bytes() == b"1"
        assert sf.weights.locate("https://publisher.example/b.bin").read_bytes() == b"1"
        with pytest.raises(DataIntegrityError, match="not the file that is meant"):
            sf.weights.locate("hub:owner/repo/a.bin", sha256=_hash(b"2"))
        (tmp_path / "own" / "c.bin").write_bytes(b"3")
        assert sf.weights.locate("hub:other/repo/c.bin", sha256=_hash(b"3")) == tmp_path / "own" / "c.bin"
        with pytest.raises(InputError, match="STFM_OFFLINE is set"):  # a name alone does not say whose it is
            sf.weights.locate("https://publisher.example/c.bin")


@pytest.mark.usefixtures("cache")
def test_addresses_that_differ_are_files_that_differ(home):
    places = {
        sf.weights.locate(f"{home.url}/{rest}").relative_to(sf.settings.cache_dir / "weights" / "url")
        for rest in ("a/w.bin", "w.bin", "w.bin?id=1", "w.bin?id=2", "", "../../w")
    }
    assert len(places) == 6
    assert all(len(place.parts) > 1 and ".." not in place.parts for place in places)


def test_what_came_through_a_mirror_is_used_without_it(home, cache):
    with sf.settings.override(mirror=home.url):
        path = sf.weights.locate("hub:owner/repo/z.bin")
    with sf.settings.override(offline=True):
        assert sf.weights.locate("hub:owner/repo/z.bin") == path


def test_packaged_files_are_checked(row, tmp_path):
    (tmp_path / "a").write_text("1")
    row("shipped", packaged=tmp_path, files={"a": _hash(b"1")})
    assert sf.weights.fetch("shipped") == tmp_path / "a"
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("2")
    assert sf.weights.verify("shipped")["state"].tolist() == ["damaged", "unlisted"]
    with pytest.raises(DataIntegrityError, match="not the file that is meant"):
        sf.weights.fetch("shipped")
    (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="do not come with this version"):
        sf.weights.fetch("shipped")


def test_terms_are_told_with_the_card(row, home, cache, sha256):
    row("gated", urls=(home.url,), files={"w.bin": sha256}, gated=True, card="https://publisher.example/card")
    home.status = 403
    with pytest.raises(InputError, match="terms .*accept them at https://publisher.example/card"):
        sf.weights.fetch("gated")
    with pytest.raises(InputError, match="terms .*accept them at http://127"):
        sf.weights.locate(f"{home.url}/w.bin", gated=True)


def test_a_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"1")
    assert sf.weights.locate(tmp_path / "w.bin", sha256=_hash(b"1")) == tmp_path / "w.bin"
    assert sf.weights.locate(str(tmp_path)) == tmp_path
    with pytest.raises(DataIntegrityError, match="not the file that is meant"):
        sf.weights.locate(tmp_path / "w.bin", sha256=_hash(b"2"))
    with pytest.raises(MissingKeyError, match="There is no file .*Did you mean 'default'.*hub:"):
        sf.weights.locate("defualt")
    with pytest.raises(MissingKeyError, match="There is no set of weights 'defualt'. Did you mean 'default'"):
        sf.weights.fetch("defualt")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "thing"}, "kind='thing' is none of"),
        ({"files": {"w.bin": "abc"}}, "'abc' is no sha256"),
        ({"files": {"../w.bin": "0" * 64}}, "leaves the folder"),
        ({"files": {"/w.bin": "0" * 64}}, "leaves the folder"),
    ],
)
def test_wrong_rows_are_refused(fields, match):
    with pytest.raises(InputError, match=match):
        WeightsSpec("wrong", "a test", **fields)


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(home, tmp_path):
    """Return a function that locates a file through the real huggingface_hub, pointed at the server."""
    pytest.importorskip("huggingface_hub")
    home.extra = {"X-Repo-Commit": "0" * 40}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "STFM_"))},
        "HF_ENDPOINT": home.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "secret",
        "HF_HUB_DISABLE_TELEMETRY": "1", "STFM_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip

    def locate(code: str, **more: str) -> subprocess.CompletedProcess[str]:
        code = f"import stfm, sys\nfrom stfm.errors import StfmError\nfound = stfm.weights.locate({code})\nprint(found)"
        return subprocess.run(
            [sys.executable, "-c", code], env={**environment, **more}, capture_output=True, text=True, check=False
        )

    return locate


def test_the_hub_gives_a_file_with_the_token_of_the_environment(hub, home, sha256, tmp_path):
    done = hub(f"'hub:owner/repo/a/w.bin', sha256={sha256!r}")
    assert done.returncode == 0, done.stderr
    path = done.stdout.strip()
    assert path.startswith(str(tmp_path / "hf"))
    with open(path, "rb") as file:  # noqa: PTH123
        assert file.read() == home.content
    assert home.gets[-1]["path"] == "/owner/repo/resolve/main/a/w.bin"
    assert home.asked[0]["authorization"] == "Bearer secret"
    n = len(home.asked)
    offline = hub("'hub:owner/repo/a/w.bin'", STFM_OFFLINE="1")
    assert offline.stdout.strip() == path
    absent = hub("'hub:owner/repo/b.bin'", STFM_OFFLINE="1")
    assert "b.bin of owner/repo is not in the cache of the hub, and STFM_OFFLINE is set" in absent.stderr
    assert len(home.asked) == n


@pytest.mark.parametrize(
    ("code", "gated", "said"),
    [
        ("GatedRepo", False, "behind terms that are to be accepted first: accept them at https://huggingface.co/o/r"),
        ("RepoNotFound", True, "behind terms that are to be accepted first"),
        ("RepoNotFound", False, "There is no 'o/r' on the hub, or it is not public"),
        ("EntryNotFound", False, "o/r has no file 'w.bin'"),
    ],
)
def test_the_hub_says_no(code, gated, said, hub, home):
    home.status = {"GatedRepo": 403, "RepoNotFound": 401}.get(code, 404)
    home.extra |= {"X-Error-Code": code, "X-Error-Message": "no"}
    done = hub(f"'hub:o/r/w.bin', gated={gated}")
    last = done.stderr.strip().splitlines()[-1]
    assert said in last, done.stderr
    assert ("HF_TOKEN" in last) == (code != "EntryNotFound")


@pytest.mark.usefixtures("cache")
def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    errors = pytest.importorskip("huggingface_hub.errors")

    def download(*_args, **_kwargs):
        raise errors.LocalEntryNotFoundError("nothing")  # what the client says after it has tried for a while

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download, errors=errors))
    with pytest.raises(
        InputError, match=r"w\.bin of o/r is not in the cache of the hub, and the hub cannot be reached"
    ):
        sf.weights.locate("hub:o/r/w.bin")


def test_another_file_from_the_hub_is_refused(hub):
    done = hub(f"'hub:owner/repo/w.bin', sha256={'0' * 64!r}")
    assert "DataIntegrityError: hub:owner/repo/w.bin is not the file that is meant" in done.stderr


def test_a_row_of_the_hub_is_copied_into_the_cache(row, cache, sha256, home, tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(home.content)
    asked = []

    def download(repo, file, *, revision, local_files_only):
        asked.append((repo, file, revision, local_files_only))
        return str(tmp_path / "w.bin")

    errors = SimpleNamespace(EntryNotFoundError=LookupError, HfHubHTTPError=ConnectionError)
    module = SimpleNamespace(hf_hub_download=download, errors=errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    row("ofhub", urls=("hub:owner/repo@v1",), files={"w.bin": sha256})
    assert sf.weights.fetch("ofhub") == cache / "weights" / "ofhub" / "w.bin"
    assert sf.weights.fetch("ofhub").read_bytes() == home.content
    assert asked == [("owner/repo", "w.bin", "v1", False)]


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'stfm\[hub\]'"):
        sf.weights.locate("hub:owner/repo/w.bin")
    wrong = ("hub:", "hub:owner/repo", "hub:owner", "hub:owner/repo/../../x", "hub:../../x", "hub:o/r@../x")
    for source in wrong:
        for mirror in (None, "http://127.0.0.1:9"):
            with sf.settings.override(mirror=mirror), pytest.raises(InputError, match="names no file on the hub; it"):
                sf.weights.locate(source)


def test_a_damaged_copy_of_a_file_of_the_hub_is_fetched_again(cache, home, monkeypatch, tmp_path):
    with sf.settings.override(mirror=home.url):
        kept = sf.weights.locate("hub:owner/repo/w.bin")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert sf.weights.locate("hub:owner/repo/w.bin") == kept == cache / "weights" / "hub" / "owner" / "repo" / "w.bin"
    kept.write_bytes(b"damaged")
    (tmp_path / "w.bin").write_bytes(home.content)
    errors = SimpleNamespace(EntryNotFoundError=LookupError, HfHubHTTPError=ConnectionError)
    module = SimpleNamespace(hf_hub_download=lambda *_a, **_k: str(tmp_path / "w.bin"), errors=errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert sf.weights.locate("hub:owner/repo/w.bin") == tmp_path / "w.bin"
