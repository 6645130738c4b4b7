"""Expression from H&E: learned where there is something to learn, chosen without the test section, saved, refused."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest

from stfm import get, metrics, tl
from stfm.errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.inference.contexts import COARSE_CONTEXTS_UM, CONTEXTS_UM, context_features, default_contexts
from stfm.inference.expression import ExpressionPredictor, fit_expression
from stfm.inference.expression_mlp import MLPConfig
from stfm.nn.ridge import Basis, Choice, held_out, solve
from stfm.slide import as_slides

GENES = ["EOSIN", "NUCLEI", "FLAT", "NOISE"]
SMALL = {"features": "handcrafted", "contexts_um": (100.0,), "rings": 0, "tile_px": 40, "genes": GENES, "cache": False}


def _section(name: str, seed: int, side: int = 9) -> ad.AnnData:
    """Square lattice of 200 µm at 4 µm/px: reddish where EOSIN is high, dotted where NUCLEI is."""
    rng = np.random.default_rng(seed)
    pitch = 50
    image = np.full(((side + 1) * pitch, (side + 1) * pitch, 3), 225.0)
    x, y = (c.ravel() for c in np.meshgrid(np.arange(side), np.arange(side)))
    red, dots = rng.random(side * side), rng.random(side * side)
    for i in range(side * side):
        top, left = (y[i] + 1) * pitch - 25, (x[i] + 1) * pitch - 25
        patch = image[top : top + 50, left : left + 50]
        patch[..., 1] -= 90 * red[i]
        dark = rng.random((50, 50)) < 0.25 * dots[i]
        patch[dark] = (90, 60, 140)
    image = np.clip(image + rng.normal(scale=3, size=image.shape), 0, 255).astype(np.uint8)
    rate = np.column_stack([40 * red, 40 * dots, np.full(side * side, 20.0), np.full(side * side, 20.0)])
    rest = np.full((side * side, 6), 60.0)
    counts = rng.poisson(np.column_stack([rate, rest])).astype(np.float32)
    adata = ad.AnnData(counts)
    adata.var_names = [*GENES, *[f"REST{i}" for i in range(6)]]
    adata.obs_names = [f"{name}-{i}" for i in range(side * side)]
    adata.obs["library_id"] = name
    adata.obs["patient"] = f"patient {seed}"
    adata.obsm["spatial"] = np.column_stack([x + 1, y + 1]) * float(pitch)
    adata.uns["spatial"] = {
        name: {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 1.0, "microns_per_pixel": 4.0}}
    }
    return adata


@pytest.fixture(scope="module")
def sections() -> list[ad.AnnData]:
    return [_section(f"s{i}", i) for i in range(3)]


@pytest.fixture(scope="module")
def predictor(sections: list[ad.AnnData]) -> ExpressionPredictor:
    return tl.fit_expression(sections[:2], **SMALL)


def _scores(adata: ad.AnnData, key: str = "predicted_expression") -> np.ndarray:
    counts = adata.X
    truth = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))[:, : len(GENES)]
    return metrics.gene_pearson(truth, adata.obsm[key][GENES])


@pytest.mark.parametrize("method", ["ridge", "mlp"])
def test_reads_morphology(sections: list[ad.AnnData], method: str):
    target = sections[2].copy()
    assert tl.predict_expression(target, reference=sections[:2], method=method, **SMALL) is None
    r = _scores(target)
    assert r[0] > 0.8
    assert r[1] > 0.7
    assert np.abs(r[2:]).max() < 0.5
    table = target.obsm["predicted_expression"]
    assert table.columns.tolist() == GENES
    assert table.dtypes.unique().tolist() == [np.float32]
    assert table.index.equals(target.obs_names)
    note = target.uns["predicted_expression"]
    assert note["scale"].startswith("log1p(1e4")
    assert note["model"]["method"] == method
    assert note["seen"]["slides"].tolist() == ["s0", "s1"]
    assert note["seen"]["patients"].tolist() == ["patient 0", "patient 1"]


def test_counts_of_the_target_are_not_looked_at(sections: list[ad.AnnData], predictor: ExpressionPredictor):
    blind = sections[2].copy()
    blind.X = np.full(blind.shape, -1.5, np.float32)
    seen = tl.predict_expression(sections[2], model=predictor, cache=False, copy=True)
    tl.predict_expression(blind, model=predictor, cache=False)
    key = "predicted_expression"
    np.testing.assert_array_equal(blind.obsm[key].to_numpy(), seen.obsm[key].to_numpy())
    assert key not in sections[2].obsm


def test_saved_predictor_predicts_the_same(sections, predictor: ExpressionPredictor, tmp_path):
    predictor.save(tmp_path / "p")
    again = ExpressionPredictor.load(tmp_path / "p")
    assert (again.genes, dict(again.choice)) == (predictor.genes, dict(predictor.choice))
    one = tl.predict_expression(sections[2], model=predictor, genes=["NUCLEI"], cache=False, copy=True)
    two = tl.predict_expression(sections[2], model=tmp_path / "p", genes=["NUCLEI"], cache=False, copy=True)
    assert one.obsm["predicted_expression"].columns.tolist() == ["NUCLEI"]
    np.testing.assert_array_equal(one.obsm["predicted_expression"], two.obsm["predicted_expression"])
    one.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").obsm["predicted_expression"].columns.tolist() == ["NUCLEI"]


def test_result_is_an_anndata_of_its_own(sections: list[ad.AnnData], predictor: ExpressionPredictor):
    target = tl.predict_expression(sections[2], model=predictor, cache=False, key_added="p", copy=True)
    own = get.predicted(target, key="p")
    assert own.var_names.tolist() == GENES
    assert own.obs_names.equals(target.obs_names)
    assert "spatial" in own.obsm
    assert "p" not in own.obsm
    np.testing.assert_array_equal(own.X, target.obsm["p"].to_numpy())
    with pytest.raises(MissingKeyError, match="run stfm.tl.predict_expression"):
        get.predicted(target)


def test_many_libraries_at_once(sections: list[ad.AnnData], predictor: ExpressionPredictor):
    both = ad.concat(sections[1:], uns_merge="unique")
    order = np.random.default_rng(0).permutation(both.n_obs)
    mixed = both[order].copy()
    with pytest.warns(StfmWarning, match="Slide 's1' is in the target"):
        tl.predict_expression(mixed, model=predictor, cache=False)
    alone = tl.predict_expression(sections[2], model=predictor, cache=False, copy=True)
    mine = mixed.obsm["predicted_expression"].loc[sections[2].obs_names]
    np.testing.assert_allclose(mine, alone.obsm["predicted_expression"], atol=1e-5)


def _quietly_unseen(target: ad.AnnData, **options):
    """Predict under warnings that are errors, and return what is recorded."""
    done = tl.predict_expression(target, cache=False, copy=True, **options)
    record = done.uns["predicted_expression"]
    return record["seen_in_training"].tolist(), record["patient_seen_in_training"].tolist()


def test_a_measured_slide_that_was_seen_is_told_and_marked(sections, predictor: ExpressionPredictor, tmp_path):
    from stfm import pl

    assert _quietly_unseen(sections[2], model=predictor) == ([False], [False])
    with pytest.warns(
        StfmWarning, match=r"Slide 's0' is in the target and in what the model saw\..*other tissue"
    ) as told:
        done = tl.predict_expression(sections[0], model=predictor, cache=False, copy=True)
    assert len(told) == 1
    done.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    own = get.predicted(read).uns["predicted_expression"]
    assert list(own["libraries"]) == ["s0"]
    assert own["seen_in_training"].tolist() == own["patient_seen_in_training"].tolist() == [True]
    axes = pl.predicted_expression(read, "NUCLEI", image=False)
    assert [ax.get_title().endswith("(slide seen)") for ax in axes[0]] == [False, True]
    predictor.save(tmp_path / "p")
    with pytest.warns(StfmWarning, match="Slide 's1' is in the target"):
        tl.predict_expression(sections[1], model=tmp_path / "p", cache=False, copy=True)
    with pytest.warns(StfmWarning, match="Slide 's1' is in the target"):
        tl.predict_expression(sections[1], reference=sections[:2], copy=True, **SMALL)
    unmeasured = ad.AnnData(
        obs=sections[0].obs, obsm={"spatial": sections[0].obsm["spatial"]}, uns=dict(sections[0].uns)
    )
    assert _quietly_unseen(unmeasured, model=predictor) == ([True], [True])  # nothing to compare with: no warning


def test_another_slide_of_a_patient_that_was_seen(sections, predictor: ExpressionPredictor):
    from stfm import pl

    cousin = sections[2].copy()
    cousin.obs["patient"] = "patient 1"
    with pytest.warns(
        StfmWarning, match=r"^Patient 'patient 1' is in the target and in what the model saw\..*other patients"
    ):
        tl.predict_expression(cousin, model=predictor, cache=False)
    assert pl.predicted_expression(cousin, "NUCLEI", image=False)[0, 1].get_title().endswith("(patient seen)")
    # a name means something within a study only
    for study, same in (("one", False), ("two", True)):
        cousin.obs["study"] = study
        known = ExpressionPredictor(
            predictor.genes, predictor.arrays, predictor.choice, predictor.features,
            {**predictor.seen, "studies": ["two"]},
        )  # fmt: skip
        if same:
            with pytest.warns(StfmWarning, match="Patient"):
                tl.predict_expression(cousin, model=known, cache=False)
        else:
            assert _quietly_unseen(cousin, model=known) == ([False], [False])


def test_slides_without_a_name_are_not_taken_for_each_other(sections, predictor: ExpressionPredictor):
    nameless = sections[2].copy()
    del nameless.obs["library_id"]
    nameless.uns["spatial"] = {"slide": nameless.uns["spatial"]["s2"]}
    known = ExpressionPredictor(
        predictor.genes, predictor.arrays, predictor.choice, predictor.features, {"slides": ["slide"]}
    )
    assert _quietly_unseen(nameless, model=known) == ([False], [False])


def test_what_the_model_behind_the_features_saw_counts(sections):
    from stfm.models.base import Seen
    from stfm.slide import as_slides
    from stfm.tl._seen import exposure

    behind = Seen()
    behind.add(as_slides(sections[2]))
    found = exposure(as_slides(sections[1:]), {"slides": ["s0"], "patients": ["patient 0"]}, behind, None)
    assert (found.slides, found.patients) == ((False, True), (False, True))
    assert found.words == ("Slide 's2' is in the target and in what the model saw.",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key_added": ""}, InputError, "key_added is empty"),
        ({"key_added": 3}, WrongTypeError, "key_added must be a string"),
        ({}, InputError, "give either reference= .* or model="),
        ({"model": "nowhere"}, MissingKeyError, "no folder nowhere with a saved model"),
        ({"model": 3}, WrongTypeError, "model must be a fitted predictor"),
        ({"reference": "sections", "method": "lasso"}, InputError, "method='lasso' is unknown"),
        ({"reference": "sections", "genes": ["NUCLEY"]}, InputError, "gene 'NUCLEY' .* Did you mean 'NUCLEI'"),
        ({"reference": "sections", "genes": "hvg25"}, InputError, "no gene set.*hvg250"),
        ({"reference": "sections", "genes": []}, InputError, "genes is empty"),
        ({"reference": "sections", "features": "uni"}, InputError, "give its checkpoint with weights="),
        ({"reference": "sections", "features": "handcraft"}, MissingKeyError, "Did you mean 'handcrafted'"),
        ({"reference": "sections", "features": 1}, WrongTypeError, "features must be the name"),
        ({"reference": "sections", "rings": -1}, InputError, "rings must be at least 0"),
        ({"reference": "sections", "contexts_um": ()}, InputError, "contexts_um is empty"),
        ({"reference": "no image"}, InputError, "library 's0' has no H&E"),
    ],
)
def test_bad_input_leaves_the_object_untouched(sections, options: dict, error: type, message: str):
    target = sections[2].copy()
    if options.get("reference") == "sections":
        options = {**options, "reference": sections[:1]}
    elif "reference" in options:
        plain = sections[0].copy()
        del plain.uns["spatial"]
        options = {**options, "reference": plain, "mpp": {"s0": 4.0}}
    with pytest.raises(error, match=message):
        tl.predict_expression(
            target, **{**{k: SMALL[k] for k in ("contexts_um", "rings", "tile_px", "cache")}, **options}
        )
    assert "predicted_expression" not in target.obsm
    assert "predicted_expression" not in target.uns


def test_other_guards(sections, predictor: ExpressionPredictor, tmp_path):
    with pytest.raises(WrongTypeError, match="must be AnnData"):
        tl.predict_expression(sections[0].X, model=predictor)
    without = sections[0].copy()
    del without.uns["spatial"]
    with pytest.raises(InputError, match="has no H&E"):
        tl.predict_expression(without, model=predictor, mpp=4.0)
    with pytest.raises(InputError, match="names a gene set"):
        tl.predict_expression(sections[2], model=predictor, genes="hvg250")
    with pytest.raises(InputError, match="has no gene 'X'"):
        tl.predict_expression(sections[2], model=predictor, genes=["X"])
    with pytest.raises(InputError, match="reads 67 features"):
        predictor.predict(np.zeros((2, 3)))
    broken = {**predictor.arrays, "intercept": np.full_like(predictor.arrays["intercept"], np.nan)}
    replace(predictor, arrays=broken).save(tmp_path)
    with pytest.raises(DataIntegrityError, match="intercept holds numbers that are not finite"):
        ExpressionPredictor.load(tmp_path)
    predictor.save(tmp_path)
    (tmp_path / "genes.txt").write_text("A\n")
    with pytest.raises(DataIntegrityError, match="genes.txt has 1 genes"):
        ExpressionPredictor.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataIntegrityError, match="something else than a predictor"):
        ExpressionPredictor.load(tmp_path)
    (tmp_path / "predictor.safetensors").write_bytes(b"1234567890")
    with pytest.raises(DataIntegrityError, match="is damaged"):
        ExpressionPredictor.load(tmp_path)


def test_other_weights_are_noticed(sections: list[ad.AnnData], predictor: ExpressionPredictor):
    from stfm.encoders.build import build_encoder

    other = build_encoder("cnn-tiny", mode="frozen")
    with pytest.raises(InputError, match="fitted on features of 'handcrafted' with other weights"):
        tl.predict_expression(sections[2], model=predictor, features=other, cache=False)


def test_contexts_and_rings(sections: list[ad.AnnData]):
    from stfm.encoders.build import build_encoder

    (slide,) = as_slides(sections[0])
    encoder = build_encoder("handcrafted")
    plain = context_features(slide, encoder, contexts_um=(100.0, 300.0), rings=0, tile_px=32, cache=False)
    ringed = context_features(slide, encoder, contexts_um=(100.0, 300.0), rings=2, tile_px=32, cache=False)
    assert plain.shape == (81, 134)
    assert ringed.shape == (81, 3 * 134)
    np.testing.assert_array_equal(ringed[:, :134], plain)
    centre = 4 * 9 + 4
    ring1 = [i for i in range(81) if i != centre and max(abs(i // 9 - 4), abs(i % 9 - 4)) == 1]
    np.testing.assert_allclose(ringed[centre, 134:268], plain[ring1].mean(axis=0), rtol=1e-4, atol=1e-5)
    assert default_contexts([slide]) == CONTEXTS_UM
    with pytest.warns(StfmWarning, match="16.000 by mpp="):
        assert default_contexts(as_slides(sections[0], mpp=16.0)) == COARSE_CONTEXTS_UM


def _simulated(n_sections: int, seed: int = 0, n: int = 60, f: int = 40, rank: int = 2):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(f, rank)) @ rng.normal(size=(rank, 12))
    features = [rng.normal(size=(n, f)).astype(np.float32) for _ in range(n_sections)]
    return features, [(x @ weights + 8 * rng.normal(size=(n, 12))).astype(np.float32) for x in features]


def test_ridge_is_ridge():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(50, 3))
    basis = Basis.of(x, 8)
    weights, intercept = solve(basis, y, Choice(8, 0.5, None))
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    penalty = 0.5 * np.linalg.eigvalsh(z.T @ z).mean()
    expected = np.linalg.solve(z.T @ z + penalty * np.eye(8), z.T @ (y - y.mean(axis=0)))
    np.testing.assert_allclose(basis.project(x) @ weights, z @ expected, atol=1e-4)
    np.testing.assert_allclose(intercept, y.mean(axis=0))
    wide = Basis.of(np.tile(x, (1, 20)), 8)
    np.testing.assert_allclose(wide.power, basis.power * 20, rtol=1e-4)
    low, _ = solve(basis, y, Choice(8, 0.5, 1))
    assert np.linalg.matrix_rank(low) == 1


def test_rank_is_chosen_on_held_out_sections():
    features, targets = _simulated(3)
    genes = [f"g{i}" for i in range(12)]
    full = fit_expression(features, targets, genes, ranks=(None,))
    low = fit_expression(features, targets, genes, ranks=(None, 2))
    assert low.choice["rank"] == 2
    assert low.choice["held_out_r"] > full.choice["held_out_r"]


def test_one_standard_error_is_stiffer_and_nearly_as_good():
    features, targets = _simulated(4)
    genes = list("abcdefghijkl")
    best, stiff = (fit_expression(features, targets, genes, ranks=(None,), rule=rule) for rule in ("best", "one_se"))
    assert stiff.choice["alpha"] > best.choice["alpha"]
    assert best.choice["held_out_r"] - 0.1 < stiff.choice["held_out_r"] <= best.choice["held_out_r"]
    with pytest.raises(InputError, match="rule='two_se' is unknown"):
        fit_expression(features, targets, genes, rule="two_se")


def test_one_section_is_left_out_by_blocks():
    coords = np.column_stack([np.arange(50) % 5, np.arange(50) // 5]).astype(float)
    folds = held_out([50], [coords])
    assert len(folds) == 5
    assert all(np.ptp(coords[test, 1]) <= 2 for _, test in folds)
    features, targets = _simulated(1)
    assert fit_expression(features, targets, list("abcdefghijkl")).choice["held_out"] == "blocks"


def test_mlp_alone_and_on_ridge():
    features, targets = _simulated(2)
    genes, config = list("abcdefghijkl"), MLPConfig(hidden=16, max_epochs=3, n_members=2)
    ridge = fit_expression(features, targets, genes)
    both = fit_expression(features, targets, genes, method="mlp", mlp=config)
    assert both.choice["mlp_held_out_r"] >= ridge.choice["held_out_r"] - 1e-6
    alone = fit_expression(
        features, targets, genes, method="mlp", mlp=MLPConfig(hidden=16, max_epochs=3, on_ridge=False)
    )
    assert np.abs(alone.arrays["weights"]).max() == 0
    assert alone.predict(features[0]).shape == (60, 12)
    again = fit_expression(features, targets, genes, method="mlp", mlp=config)
    np.testing.assert_array_equal(again.predict(features[0]), both.predict(features[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, g: (x, y[:1], g), "one table of features a section"),
        (lambda x, y, g: (x, [y[0], y[1][:5]], g), "section 1: features .* do not belong together"),
        (lambda x, y, g: (x, y, g[:3]), "12 targets for 3 genes"),
        (lambda x, y, g: ([x[0], x[1] * np.nan], y, g), "section 1: features or targets hold nan"),
        (lambda x, y, g: ([x[0][:4]], [y[0][:4]], g), "4 training spots are too few"),
    ],
)
def test_tables_that_do_not_fit(change, message: str):
    features, targets = _simulated(2)
    with pytest.raises(InputError, match=message):
        fit_expression(*change(features, targets, list("abcdefghijkl")))


@pytest.fixture(scope="module")
def storm(sections):
    config = {"contexts_um": (100.0,), "spot_px": 40, "width": 16, "heads": 2, "gene_width": 4, "window": 9}
    genes = [*sections[0].var_names, "NEVER"]
    return tl.train(sections[:2], "storm-tiny", config=config, stage="mask", epochs=3, batch_size=32, lr=3e-3,
                    genes=genes, validation=None)  # fmt: skip


class TestByAModel:
    """A trained model that writes expression by itself."""

    def test_reads_morphology_and_says_how(self, sections, storm, tmp_path):
        target = sections[2].copy()
        storm.save(tmp_path / "m")
        assert tl.predict_expression(target, model=tmp_path / "m") is None
        table, spread = target.obsm["predicted_expression"], target.obsm["predicted_expression_sd"]
        assert table.columns.tolist() == sections[0].var_names.tolist()  # what was never measured is left out
        assert spread.columns.equals(table.columns)
        assert table.dtypes.unique().tolist() == spread.dtypes.unique().tolist() == [np.float32]
        assert (spread > 0).all(axis=None)
        assert _scores(target)[:2].min() > 0.6
        note = target.uns["predicted_expression"]
        assert (note["by"], note["source"], note["n_measured"]) == ("storm", str(tmp_path / "m"), 0)
        assert note["seen_in_training"].tolist() == [False]
        own = tl.predict_expression(sections[2], model=storm, genes=["NUCLEI", "EOSIN"], copy=True)
        assert own.obsm["predicted_expression"].columns.tolist() == ["NUCLEI", "EOSIN"]
        np.testing.assert_allclose(own.obsm["predicted_expression"]["EOSIN"], table["EOSIN"], atol=1e-5)

    def test_counts_are_looked_at_where_they_are_said_to_be_measured(self, sections, storm):
        target = sections[2].copy()
        target.obs["measured"] = np.arange(target.n_obs) % 2 == 0
        other = target.copy()
        other.X[~target.obs["measured"].to_numpy()] = 3.0
        blind, none = other.copy(), other.copy()
        none.obs["measured"] = False
        for one in (target, other, none):
            tl.predict_expression(one, model=storm, measured_key="measured")
        tl.predict_expression(blind, model=storm)
        key = "predicted_expression"
        np.testing.assert_array_equal(other.obsm[key], target.obsm[key])
        np.testing.assert_allclose(none.obsm[key], blind.obsm[key], atol=1e-5)
        assert not np.allclose(target.obsm[key], blind.obsm[key], atol=1e-3)
        assert target.uns[key]["n_measured"] == 41

    def test_own_counts_of_a_measured_spot_are_not_looked_at(self, sections, storm):
        target = sections[2].copy()
        target.obs["measured"] = True
        other = target.copy()
        other.X[40] = other.X[40][::-1]
        for one in (target, other):
            tl.predict_expression(one, model=storm, measured_key="measured")
        one, two = (a.obsm["predicted_expression"].to_numpy() for a in (target, other))
        np.testing.assert_array_equal(one[40], two[40])
        assert not np.array_equal(one[41], two[41])

    def test_a_slide_that_was_seen_is_told(self, sections, storm):
        with pytest.warns(StfmWarning, match="tells nothing about other tissue"):
            tl.predict_expression(sections[0].copy(), model=storm)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"genes": ["EOSINE"]}, InputError, "does not know gene 'EOSINE'. Did you mean 'EOSIN'"),
            ({"genes": ["EOSIN", "NEVER"]}, InputError, "gene 'NEVER' is in the model's vocabulary, but no training"),
            ({"genes": []}, InputError, "genes is empty"),
            ({"genes": ["EOSIN", "eosin"]}, InputError, "names 'eosin' twice"),
            ({"genes": "hvg250"}, InputError, "names a gene set"),
            ({"measured_key": "measured"}, MissingKeyError, "no column 'measured', which measured_key= names"),
            ({"measured_key": "patient"}, InputError, "must hold True and False"),
        ],
    )
    def test_guards(self, sections, storm, options, error, message):
        target = sections[2].copy()
        with pytest.raises(error, match=message):
            tl.predict_expression(target, model=storm, **options)
        assert "predicted_expression" not in target.obsm
        assert "predicted_expression" not in target.uns

    def test_measured_key_needs_such_a_model(self, sections, predictor):
        with pytest.raises(InputError, match="needs a model that writes expression"):
            tl.predict_expression(sections[2].copy(), model=predictor, measured_key="patient")

    def test_slides_without_image_are_refused(self, sections, storm):
        target = sections[2].copy()
        del target.uns["spatial"]
        with pytest.raises(InputError, match=r"H&E|image"):
            tl.predict_expression(target, model=storm, mpp=4.0)


@pytest.mark.slow
def test_measured_spots_help_the_others():
    """In-context prediction on simulated tissue: with every second spot measured, r of the others rises."""
    from stfm import datasets

    adata = datasets.toy(n_spots=250, n_sections=3, n_patients=3, n_genes=330, mpp=4.0)
    known = adata[adata.obs["library_id"] != "section_3"].copy()
    new = adata[adata.obs["library_id"] == "section_3"].copy()
    model = tl.train(known, "storm-tiny", stage="mask", epochs=24, batch_size=32, lr=3e-3, validation=None)
    new.obs["measured"] = np.arange(new.n_obs) % 2 == 0
    tl.predict_expression(new, model=model, measured_key="measured", key_added="context")
    tl.predict_expression(new, model=model, key_added="alone")
    counts = new.X.toarray()
    truth = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    varied = np.argsort(-truth.var(axis=0))[:150]
    rest = ~new.obs["measured"].to_numpy()
    genes = new.var_names[varied]
    r = {
        key: float(metrics.gene_pearson(truth[rest][:, varied], new.obsm[key].loc[rest, genes]).mean())
        for key in ("context", "alone")
    }
    assert r["context"] > r["alone"] + 0.001, r


@pytest.mark.slow
@pytest.mark.parametrize("validation", [None, "section"])
def test_intervals_hold_on_a_section_of_another_patient(validation):
    """Deviations are fitted on validation slides, else by what was left out of the training sections."""
    from stfm import datasets

    adata = datasets.toy(n_spots=150, n_sections=4, n_patients=4, n_genes=330, mpp=4.0)
    known = adata[adata.obs["library_id"] != "section_4"].copy()
    new = adata[adata.obs["library_id"] == "section_4"].copy()
    model = tl.train(known, "storm-tiny", stage="mask", epochs=8, lr=3e-3, validation=validation)
    tl.predict_expression(new, model=model)
    counts = new.X.toarray()
    truth = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    mean, sd = new.obsm["predicted_expression"], new.obsm["predicted_expression_sd"]
    table = metrics.coverage(truth[:, new.var_names.get_indexer(mean.columns)], mean, sd, levels=[0.5, 0.8, 0.95])
    assert 0.4 < table.loc["overall", 0.5] < 0.6
    assert 0.7 < table.loc["overall", 0.8] < 0.9
    assert 0.9 < table.loc["overall", 0.95] < 0.99
    assert (model.calibration != 1.0).all()
