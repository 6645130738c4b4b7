"""STORM: masking, what is not read, genes that are absent, borders, predictions, learning rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stfm._errors import InputError
from stfm.models import create, load
from stfm.models._storm_spatial import Shown, draw_masks
from stfm.models.registry import MODELS
from stfm.models.storm_config import ABLATIONS, STORMConfig
from stfm.nn.batch import Batch
from stfm.slide.genes import Vocabulary
from stfm.slide.windows import window_table
from stfm.training.module import parameter_groups

N_GENES = 60
SIDE = 10
NARROW = {"width": 32, "depth": 2, "heads": 4, "gene_width": 8, "contexts_um": (112.0,), "feature_components": 0,
    "joint": "concat",
}  # fmt: skip


def make(vocabulary, seed: int = 0, **changes):
    """A model whose table of genes is fitted, as before the first step."""
    torch.manual_seed(seed)
    model = create("storm-tiny", vocabulary, **{**NARROW, **changes})
    spots = slide(model)
    model.table.fit(spots.counts, spots.totals)
    return model


def slide(model, *, window: int = 25, seed: int = 0, gene_mask: torch.Tensor | None = None) -> Batch:
    """All the windows of a square slide, with features of its tiles."""
    generator = torch.Generator().manual_seed(seed)
    n = SIDE * SIDE
    place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), dim=-1).reshape(-1, 2)
    xy = 200.0 * place.float()
    counts = torch.poisson(20 * torch.rand(n, N_GENES, generator=generator), generator=generator)
    totals = counts.sum(dim=1)
    if gene_mask is not None:
        counts = counts * gene_mask
    return Batch(
        spot_features=None if model.image is None else torch.randn(n, model.image.encoder.width, generator=generator),
        counts=torch.log1p(1e4 * counts / totals[:, None]),
        totals=totals,
        gene_mask=None if gene_mask is None else gene_mask.expand(n, -1),
        xy_um=xy,
        slide_id=torch.zeros(n, dtype=torch.long),
        index=torch.arange(n),
        window=torch.from_numpy(window_table(xy.numpy(), window).astype(np.int64)),
    )


def apart(batch: Batch) -> Batch:
    """Four windows that share no spot."""
    corners = [r * SIDE + c for r in (2, 7) for c in (2, 7)]
    return batch.take(torch.tensor(corners))


def expected(model, batch: Batch, *, own: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().predict(batch, own=own).mean


class TestMasks:
    def full(self, n: int = 400, w: int = 25) -> torch.Tensor:
        return torch.ones(n, w, dtype=torch.bool)

    def test_five_of_25_are_visible_in_each_modality_by_itself(self):
        torch.manual_seed(0)
        there = self.full()
        shown = draw_masks(there, there, there, n_visible=5, cross_share=0.0)
        assert shown.image.sum(dim=1).eq(5).all()
        assert shown.gene.sum(dim=1).eq(5).all()
        both = (shown.image & shown.gene).sum(dim=1).float()
        assert float(both.mean()) == pytest.approx(25 * 0.2 * 0.2, abs=0.15)  # chosen independently
        assert float(shown.image.float().mean(dim=0).std()) < 0.03  # every place alike

    def test_as_many_as_there_are_where_fewer_spots_exist(self):
        torch.manual_seed(0)
        there = self.full()
        there[:, 3:] = False
        gene = there.clone()
        gene[:, 2:] = False
        gene[0] = False
        shown = draw_masks(there, there, gene, n_visible=5, cross_share=0.0)
        assert torch.equal(shown.image, there)
        assert torch.equal(shown.gene, gene)
        assert torch.equal(shown.present, there)

    def test_a_share_of_the_windows_shows_all_of_the_image(self):
        torch.manual_seed(0)
        there = self.full(4000)
        shown = draw_masks(there, there, there, n_visible=5, cross_share=0.5)
        cross = shown.image.all(dim=1)
        assert float(cross.float().mean()) == pytest.approx(0.5, abs=0.04)
        n_shown = shown.gene[cross].sum(dim=1)
        assert set(n_shown.tolist()) == set(range(26))  # from none to all, few more often
        assert float((n_shown <= 5).float().mean()) == pytest.approx((6 / 26) ** 0.5, abs=0.04)
        assert shown.gene[~cross].sum(dim=1).eq(5).all()
        assert shown.image[~cross].sum(dim=1).eq(5).all()

    def test_without_image_nothing_is_crossed(self):
        there = self.full(50)
        shown = draw_masks(there, torch.zeros_like(there), there, n_visible=5, cross_share=1.0)
        assert not shown.image.any()
        assert shown.gene.sum(dim=1).eq(5).all()

    def test_the_papers_preset_masks_to_the_letter(self):
        config = STORMConfig.preset("paper")
        assert (config.window, config.n_visible, config.cross_share) == (25, 5, 0.0)
        assert config.contexts_um == (112.0,)


class TestMaskedLoss:
    @pytest.fixture
    def drawn(self, vocabulary):
        """Four windows apart, with masks and what the encoder made of the visible tokens."""
        model = make(vocabulary).eval()
        batch = apart(slide(model))
        windows = model.windows(batch)
        torch.manual_seed(3)
        shown = draw_masks(windows.present, windows.image, windows.gene, n_visible=5, cross_share=0.0)
        return model, batch, windows, shown, model.spatial(windows.tokens, shown, windows.bias)

    def test_counts_at_visible_places_are_no_target(self, drawn):
        model, batch, windows, shown, encoded = drawn
        for places, changes in ((shown.gene, False), (~shown.gene & windows.present, True)):
            counts = batch.counts.clone()
            counts[windows.rows[places]] += 1.0
            losses = [model._gene_loss(b, windows, encoded, shown) for b in (batch, replace(batch, counts=counts))]
            assert torch.equal(*losses) is not changes

    def test_features_at_visible_places_are_no_target(self, drawn):
        model, _, windows, shown, encoded = drawn
        for places, changes in ((shown.image, False), (~shown.image & windows.present, True)):
            features = windows.features.clone()
            features[windows.rows[places]] += 1.0
            losses = [model._image_loss(w, encoded, shown) for w in (windows, replace(windows, features=features))]
            assert torch.equal(*losses) is not changes

    def test_what_is_hidden_is_not_read(self, drawn):
        model, _, windows, shown, encoded = drawn
        other = {
            name: torch.where(shown.of(name)[..., None], tokens, 50 * torch.randn_like(tokens))
            for name, tokens in windows.tokens.items()
        }
        again = model.spatial(other, shown, windows.bias)
        for name, tokens in encoded.items():
            torch.testing.assert_close(again[name][shown.of(name)], tokens[shown.of(name)])
        for decoder in (model.image_decoder, model.gene_decoder):
            written = decoder(encoded, shown, windows.bias)
            torch.testing.assert_close(decoder(again, shown, windows.bias), written)

    def test_parts_add_up_with_their_weights(self, vocabulary):
        model = make(vocabulary, image_weight=0.25, gene_weight=2.0).train()
        losses = model.losses(slide(model))
        torch.testing.assert_close(losses["loss"], 0.25 * losses["image"] + 2.0 * losses["gene"])

    def test_nothing_hidden_costs_nothing(self, vocabulary):
        model = make(vocabulary, window=9, n_visible=5, cross_share=0.0).train()
        losses = model.losses(slide(model, window=4))
        assert losses["loss"].item() == 0.0
        losses["loss"].backward()

    def test_a_config_that_hides_nothing_is_refused(self, vocabulary):
        with pytest.raises(InputError, match="hides nothing"):
            make(vocabulary, window=4, n_visible=5, cross_share=0.0)


class TestTrainedOn:
    def test_what_training_lacked_is_left_out(self, vocabulary):
        model = make(vocabulary).eval()
        model.trained_on.fill_(2)  # counts alone
        batch = slide(model)
        with torch.no_grad():
            both, counts = model.embed(batch), model.embed(batch.without("image"))
        assert both.image is None
        assert torch.equal(both.joint, counts.joint)
        with pytest.raises(InputError, match="trained on counts alone"):
            model.embed(batch.without("gene"))


class TestAbsentGenes:
    @pytest.mark.parametrize("likelihood", ["nb", "poisson", "gaussian"])
    @pytest.mark.parametrize("stage", ["mask", "align"])
    def test_have_no_gradient(self, vocabulary, likelihood: str, stage: str):
        model = make(vocabulary, likelihood=likelihood).train()
        model.stage = stage
        mask = torch.arange(N_GENES) < 45
        model.losses(slide(model, gene_mask=mask))["loss"].backward()
        for name in ("embedding", "offset", "log_step", "log_spread"):
            grad = getattr(model.table, name).grad
            if grad is not None:
                assert not grad[~mask].any(), name
                assert grad[mask].any(), name

    def test_are_out_of_the_loss(self, vocabulary):
        model = make(vocabulary).train()
        mask = torch.arange(N_GENES) < 45
        batch = slide(model, gene_mask=mask)
        other = replace(batch, counts=torch.where(mask, batch.counts, 7.0))
        values = []
        for one in (batch, other):
            torch.manual_seed(0)
            values.append(model.losses(one)["loss"])
        assert torch.equal(*values)

    def test_drawn_genes_are_some_of_all_in_training_alone(self, vocabulary):
        model = make(vocabulary, max_genes=20)
        assert len(model.train()._drawn_genes(torch.device("cpu")).unique()) == 20
        assert torch.equal(model.eval()._drawn_genes(torch.device("cpu")), torch.arange(N_GENES))


class TestPlaces:
    def test_nothing_is_read_from_empty_places(self, vocabulary):
        model = make(vocabulary).eval()
        whole = slide(model)
        border = whole.take(torch.tensor([0, 4, SIDE * SIDE - 1]))
        assert (border.window < 0).any(dim=1).all()
        # Empty places point to the first row: another one stands there.
        shifted = {
            name: torch.cat([torch.full_like(t[:1], 9), t])
            for name, t in border.tensors().items() if name != "window"
        }  # fmt: skip
        other = Batch(**shifted, window=torch.where(border.window >= 0, border.window + 1, -1))
        with torch.no_grad():
            for name, part in vars(model.embed(border)).items():
                torch.testing.assert_close(getattr(model.embed(other), name), part, msg=name)
        torch.testing.assert_close(expected(model, other), expected(model, border))
        torch.testing.assert_close(expected(model, other, own=True), expected(model, border, own=True))

    def test_a_wider_table_of_empty_places_changes_nothing(self, vocabulary):
        model = make(vocabulary).eval()
        batch = slide(model)
        wide = replace(batch, window=torch.nn.functional.pad(batch.window, (0, 11), value=-1))
        with torch.no_grad():
            torch.testing.assert_close(model.embed(wide).joint, model.embed(batch).joint)

    def test_turned_and_shifted_slides_embed_alike(self, vocabulary):
        model = make(vocabulary).eval()
        batch = slide(model)
        turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
        other = replace(batch, xy_um=batch.xy_um @ turn.T + 3000)
        with torch.no_grad():
            torch.testing.assert_close(model.embed(other).joint, model.embed(batch).joint, atol=1e-4, rtol=1e-3)

    def test_distance_matters_unless_it_is_ablated(self, vocabulary):
        for ablation, matters in (("full", True), ("no-distance", False)):
            model = make(vocabulary, ablation=ablation).eval()
            batch = slide(model)
            with torch.no_grad():
                near, far = (model.embed(replace(batch, xy_um=s * batch.xy_um)).joint for s in (0.5, 2.0))
            assert torch.equal(near, far) is not matters


class TestPrediction:
    def test_own_counts_are_not_looked_at(self, vocabulary):
        model = make(vocabulary).eval()
        batch = slide(model)
        middle = 40
        counts = batch.counts.clone()
        counts[middle] = counts[middle].flip(0)
        other = replace(batch, counts=counts)
        before, after = expected(model, batch), expected(model, other)
        assert torch.equal(before[middle], after[middle])
        assert not torch.equal(before[middle + 1], after[middle + 1])  # its neighbour sees them
        assert not torch.equal(*(expected(model, b, own=True)[middle] for b in (batch, other)))

    def test_counts_of_spots_that_were_not_measured_are_not_looked_at(self, vocabulary):
        model = make(vocabulary).eval()
        batch = slide(model)
        measured = torch.arange(SIDE * SIDE) % 3 == 0
        other = torch.where(measured[:, None], batch.counts, 5.0)
        one, two = (replace(batch, counts=c, measured=measured) for c in (batch.counts, other))
        torch.testing.assert_close(expected(model, one), expected(model, two))
        none = replace(one, measured=torch.zeros_like(measured))
        torch.testing.assert_close(expected(model, none), expected(model, batch.without("gene")))

    def test_deviation_is_positive_and_calibrated_by_gene(self, vocabulary):
        model = make(vocabulary).eval()
        batch = slide(model)
        with torch.no_grad():
            before = model.predict(batch).deviation
            model.calibration.copy_(torch.linspace(0.5, 2.0, N_GENES))
            torch.testing.assert_close(model.predict(batch).deviation, before * model.calibration)
        assert (before > 0).all()

    def test_regression_is_blended_in(self, vocabulary):
        model = make(vocabulary, linear_blend=0.5).eval()
        batch = slide(model)
        alone = expected(model, batch)
        model.linear.intercept.fill_(4.0)
        model.linear.fitted.fill_(True)
        torch.testing.assert_close(expected(model, batch), 0.5 * alone + 2.0)

    @pytest.mark.parametrize("likelihood", ["nb", "poisson", "gaussian"])
    def test_both_modalities_or_one(self, vocabulary, likelihood: str):
        model = make(vocabulary, likelihood=likelihood).eval()
        batch = slide(model)
        for some in (batch, batch.without("image"), batch.without("gene")):
            written = model.predict(some, own=True)
            assert written.mean.shape == written.deviation.shape == (SIDE * SIDE, N_GENES)
            assert torch.isfinite(written.mean).all()
            assert torch.isfinite(written.deviation).all()


class TestStages:
    def test_masking_runs_with_one_modality(self, vocabulary):
        model = make(vocabulary).train()
        batch = slide(model)
        assert set(model.losses(batch.without("image"))) == {"loss", "gene"}
        assert set(model.losses(batch.without("gene"))) == {"loss", "image"}
        assert set(model.losses(batch)) == {"loss", "image", "gene"}

    @pytest.mark.parametrize(("absent", "name"), [("image", "H&E"), ("gene", "counts")])
    def test_alignment_says_what_is_missing(self, vocabulary, absent: str, name: str):
        model = make(vocabulary).train()
        model.stage = "align"
        with pytest.raises(InputError, match=f"has no {name}, and alignment needs both modalities; stage='mask' can"):
            model.losses(slide(model).without(absent))

    def test_alignment_replays_masking_unless_it_is_off(self, vocabulary):
        model = make(vocabulary).train()
        model.stage = "align"
        assert set(model.losses(slide(model))) == {"loss", "align", "image", "gene"}
        assert all(p.requires_grad for p in model.gene_decoder.parameters())
        alone = make(vocabulary, replay=0.0).train()
        alone.stage = "align"
        assert set(alone.losses(slide(alone))) == {"loss", "align"}
        assert not any(p.requires_grad for p in alone.gene_decoder.parameters())
        with pytest.raises(InputError, match="stage='algin' is unknown"):
            alone.stage = "algin"

    def test_aligned_windows_find_each_other(self, vocabulary):
        """With H&E and counts that tell of the same thing, alignment learns to pair them."""
        model = make(vocabulary, replay=0.0, dropout=0.0, feature_dropout=0.0).train()
        model.stage = "align"
        batch = slide(model)
        told = torch.randn(model.image.encoder.width, N_GENES, generator=torch.Generator().manual_seed(0)) / 7
        batch = replace(batch, counts=(batch.spot_features @ told + 2).clamp_min(0))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            loss = model.losses(batch)["loss"]
            loss.backward()
            optimiser.step()
        assert loss.item() < 0.5 * np.log(SIDE * SIDE)
        embedded = model.eval().embed(batch)
        found = (embedded.image @ embedded.gene.T).argmax(dim=1) == torch.arange(SIDE * SIDE)
        assert float(found.float().mean()) > 0.5


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_train_embed_and_predict(vocabulary, ablation: str):
    model = make(vocabulary, ablation=ablation).train()
    batch = slide(model, window=model.inputs.window)
    losses = model.losses(batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    embedded = model.eval().embed(batch)
    assert (embedded.image is None) == (ablation == "no-image")
    assert (embedded.gene is None) == (ablation == "no-gene")
    assert torch.isfinite(expected(model, batch)).all()
    assert model.inputs.window == (1 if ablation == "no-neighbours" else 25)
    assert len(model.spatial.blocks[0].experts) == (1 if ablation == "shared-experts" else 2)


def test_learning_rates_fall_by_layer():
    """FACTS: factor 0.7, 12 blocks, ids 0 to 13."""
    genes = Vocabulary(np.array([f"GENE{i}" for i in range(N_GENES)]))
    model = make(genes, depth=12)
    scale = {id(p): g["lr_scale"] for g in parameter_groups(model, layer_decay=0.7) for p in g["params"]}
    for number, block in enumerate(model.spatial.blocks, start=1):
        found = [scale[id(p)] for p in block.parameters()]
        assert found == pytest.approx([0.7 ** (13 - number)] * len(found))
    assert scale[id(model.table.embedding)] == pytest.approx(0.009688901)
    assert [scale[id(p)] for p in model.gene_token.parameters()] == pytest.approx([0.7**13] * 2)
    assert {scale[id(p)] for p in model.gene_decoder.parameters()} == {1.0}
    assert sorted({round(s, 9) for s in scale.values()}) == [round(0.7**i, 9) for i in range(13, -1, -1)]
    assert {g["lr_scale"] for g in parameter_groups(model)} == {1.0}


def test_a_model_of_many_genes_reads_a_small_panel(vocabulary, tmp_path):
    model = make(vocabulary).eval()
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    mask = torch.arange(N_GENES) % 6 == 0
    batch = slide(again, gene_mask=mask).without("image")
    with torch.no_grad():
        assert torch.isfinite(again.embed(batch).joint).all()
        assert again.predict(batch, own=True).mean.shape == (SIDE * SIDE, N_GENES)
    assert again.written_genes().all()


def test_settings_that_make_no_model():
    for changes, said in (
        ({"width": 50, "heads": 4}, "width must be a multiple of heads"),
        ({"contexts_um": ()}, "contexts_um is empty"),
        ({"image": None, "ablation": "no-gene"}, "one modality at least"),
        ({"n_visible": 0, "cross_share": 0.5}, "n_visible=0 hides everything"),
        ({"likelihood": "zinb"}, "likelihood='zinb' is unknown"),
        ({"ablation": "no-genes"}, "Did you mean 'no-gene'"),
        ({"window": 0}, "window"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(InputError, match=said):
            STORMConfig(**changes)
    with pytest.raises(InputError, match="needs a vocabulary"):
        create("storm-tiny")


def test_batches_without_windows_are_refused(vocabulary):
    model = make(vocabulary)
    with pytest.raises(InputError, match="reads windows of spots with coordinates"):
        model.embed(replace(slide(model), window=None))


def test_shown_masks_of_a_modality():
    present, image, gene = (torch.tensor([[True, v]]) for v in (True, False, True))
    shown = Shown(present, image, gene)
    assert torch.equal(shown.of("image"), image)
    assert torch.equal(shown.of("gene"), gene)
    assert {"storm", "storm-paper", "storm-small", "storm-tiny"} <= set(MODELS.names())


class TestCalibration:
    """``calibrate`` on slides in memory."""

    def inputs(self, model, *, factor: float = 1.0, counts: bool = True):
        """A slide whose counts are those of :func:`slide`, times a factor."""
        from scipy import sparse

        from stfm.models.inputs import SlideInputs
        from stfm.slide.counts import Counts
        from stfm.slide.genes import Panel
        from stfm.slide.slide import Slide

        batch = slide(model)
        raw = torch.expm1(batch.counts) * batch.totals[:, None] / 1e4
        raw = (factor * raw).round().numpy()[:, :40]
        n = SIDE * SIDE
        one = Slide(
            name="A", coords=batch.xy_um.double().numpy(), obs_names=np.arange(n).astype(str), rows=np.arange(n),
            counts=Counts(sparse.csr_matrix(raw)) if counts else None,
            panel=Panel(np.array([f"GENE{i}" for i in range(40)])) if counts else None,
            tiles=_Tiles(n), niches=None, mpp=1.0, spot_um=55.0, niche_um=None,
        )  # fmt: skip
        made = SlideInputs(one, model.inputs, model.vocabulary)
        made.spot_features = batch.spot_features.numpy()
        return made

    def test_deviation_gets_the_size_of_the_error(self, vocabulary):
        model = make(vocabulary, likelihood="gaussian").eval()
        with torch.no_grad():
            model.table.log_spread += 4.0 * torch.rand(N_GENES, generator=torch.Generator().manual_seed(0))
        held = self.inputs(model)
        model.calibrate([held], held_out=True)
        batch = held.batch(np.arange(held.n_obs))
        with torch.no_grad():
            written = model.predict(batch.without("gene"))
        z = ((batch.counts - written.mean) / written.deviation)[:, :40]
        torch.testing.assert_close(z.square().mean(dim=0).sqrt(), torch.ones(40), atol=2e-3, rtol=0.0)
        assert len(model.calibration[:40].unique()) > 30
        assert torch.equal(model.calibration[40:], model.calibration[:40].median().expand(20))  # not measured there

    def test_the_same_however_often(self, vocabulary):
        model = make(vocabulary).eval()
        held = self.inputs(model)
        model.calibrate([held], held_out=True)
        first = model.calibration.clone()
        model.calibrate([held], held_out=True)
        assert torch.equal(model.calibration, first)

    def test_training_slides_are_raised_to_what_was_left_out(self, vocabulary):
        model = make(vocabulary, linear_blend=0.5).eval()
        held = self.inputs(model)
        model.linear.fitted.fill_(True)
        model.linear.deviation.fill_(100.0)
        model.calibrate([held], held_out=True)
        small = model.calibration.clone()
        model.calibrate([held], held_out=False)
        assert (model.calibration[:40] > small[:40]).all()
        assert float(model.calibration.max()) <= 10.0

    def test_without_counts_it_stays_as_it_is(self, vocabulary):
        model = make(vocabulary).eval()
        model.calibrate([self.inputs(model, counts=False)], held_out=True)
        assert (model.calibration == 1).all()


class _Tiles:
    """Stands for tiles whose features are known."""

    def __init__(self, n: int) -> None:
        self.n_obs = n
