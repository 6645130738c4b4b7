"""The demo, at a size that runs in seconds: what it leaves behind, and that it says who won."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import stfm
from stfm.cli import _demo, _report, _tissue
from stfm.cli._report import Report, Row
from stfm.errors import InputError, StfmWarning

FIGURES = ("overview.png", "domains.png", "expression.png", "embedding.png", "training.png", "tiles.png")


def test_verdict_names_the_winner():
    rows = [Row("ours", 0.5, ours=True), Row("ours smoothed", 0.6, ours=True), Row("PCA", 0.55)]
    assert _report.verdict(rows) == "ours smoothed (0.600) is ahead of the best baseline, PCA (0.550)."
    beaten = _report.verdict([*rows, Row("ridge", 0.7)])
    assert beaten == "The baseline ridge (0.700) is not beaten here: ours smoothed reaches 0.600."
    assert _report.verdict(rows[:1]) == "ours reaches 0.500."


def test_report_is_written_as_text_and_json(tmp_path: Path):
    rows = [Row("ST-Align", 0.4, ours=True), Row("ridge", 0.5)]
    report = Report("toy", 3, "Simulated.", expression=rows, genes=["A", "B"], ceiling=0.8, seconds={"train": 1.5})
    _report.write(report, tmp_path, {"tiles.png": "Tiles."})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| **ST-Align** | 0.400 |" in text
    assert "The baseline ridge (0.500) is not beaten here" in text
    assert "Counting noise allows 0.800 at most." in text
    assert "![Tiles.](tiles.png)" in text
    assert "Spatial domains" not in text  # no truth, no table
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["stfm"] == stfm.__version__
    assert saved["expression"][1] == {"method": "ridge", "value": 0.5, "ours": False}


def test_unknown_data_sets_are_refused_with_what_there_is():
    with pytest.raises(InputError, match="no data set 'her2st:B1'; there are toy and, with H&E, her2st:B4"):
        _tissue.open_tissue("her2st:B1", 0)


def test_real_sections_learn_from_the_same_patient_first():
    index = ["her2st:B4", "her2st:C2", "her2st:C3", "mob:1", "mob:2"]
    table = pd.DataFrame({"patient": ["B", "C", "C", "m1", "m2"]}, index=index)
    assert _tissue._others(table, "her2st:C2") == ["her2st:C3"]
    assert _tissue._others(table, "her2st:B4") == ["her2st:C2", "her2st:C3"]
    assert _tissue._others(table, "mob:1") == ["mob:2"]


def test_toy_holds_out_a_patient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tissue, "TOY", {"n_spots": 60, "n_patients": 3, "mpp": 4.0})
        tissue = _tissue.open_tissue("toy", 0)
    patients = [slide.obs["patient"].iloc[0] for slide in (*tissue.train, tissue.test)]
    assert len(set(patients)) == len(patients) == 3
    assert [len(slide.uns["spatial"]) for slide in tissue.train] == [1, 1]


@pytest.mark.slow
def test_demo_leaves_figures_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_tissue, "TOY", {"n_spots": 80, "n_patients": 3, "n_genes": 340, "mpp": 2.0})
    monkeypatch.setattr(_demo, "MODEL", "st-align-tiny")
    report = _demo.run("toy", out=tmp_path / "out", seed=0)
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in FIGURES)
    saved = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    values = [row["value"] for table in ("domains", "expression") for row in saved[table]]
    assert np.all(np.isfinite(values))
    assert 0 < report.ceiling <= 1
    assert {row.method for row in report.expression if row.ours} != set()
    assert set(saved["verdicts"]) == {"Spatial domains", "Expression from H&E"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """``report.json`` of the demo as anybody runs it."""
    folder = tmp_path_factory.mktemp("demo")
    with stfm.settings.override(cache_dir=folder / "cache", offline=True):
        _demo.run("toy", out=folder / "out", seed=0)
    assert all((folder / "out" / name).is_file() for name in FIGURES)
    return json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))


def _scores(printed: dict, table: str) -> dict[str, float]:
    return {row["method"]: row["value"] for row in printed[table]}


@pytest.mark.slow
def test_domains_of_the_demo_are_better_than_those_of_pca(printed: dict):
    scores = _scores(printed, "domains")
    pca = max(value for method, value in scores.items() if method.startswith("PCA of genes"))
    assert scores["ST-Align"] > pca + 0.05
    assert printed["verdicts"]["Spatial domains"].startswith(f"ST-Align ({scores['ST-Align']:.3f}) is ahead")


@pytest.mark.slow
def test_expression_of_the_demo_is_better_than_that_of_colours(printed: dict):
    scores = _scores(printed, "expression")
    ours = scores["ST-Align, ridge on its image features"]
    assert ours > scores["ridge on colours around the spot"] + 0.03
    assert ours < printed["ceiling"]
    assert len(printed["genes"]) == 50


@pytest.mark.slow
@pytest.mark.parametrize("section", ["her2st:C2", "mob:1"])
def test_demo_on_real_sections_needs_no_network(
    shared_data: Path, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The public files are linked into a cache of its own: nothing is fetched, nothing is written beside them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for folder in (shared_data / "cache").iterdir():
        (cache / folder.name).symlink_to(folder)
    monkeypatch.setattr(_demo, "MODEL", "st-align-tiny")
    before = {path: path.stat().st_mtime_ns for path in (shared_data / "cache").rglob("*")}
    with (
        stfm.settings.override(cache_dir=cache, offline=True),
        pytest.warns(StfmWarning, match=r"^Patient '.*' is in the target and in what the model saw"),
    ):
        report = _demo.run(section, out=tmp_path / "out", seed=0)
    assert before == {path: path.stat().st_mtime_ns for path in (shared_data / "cache").rglob("*")}
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in FIGURES)
    assert report.domains == []  # no truth that the demo knows of
    assert "same patient" in report.tissue
    assert all(0.1 < row.value < report.ceiling for row in report.expression)
