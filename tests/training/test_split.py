"""Whole patients or sections are held out."""

from __future__ import annotations

import pytest
from fake_model import make_slide

from stfm._errors import InputError
from stfm.training.split import split_slides


def slides(patients):
    return [make_slide(f"S{i}", 6, seed=i, patient=p) for i, p in enumerate(patients)]


def names(side):
    return [s.name for s in side]


def test_patients_stay_whole():
    data = slides(["A", "A", "B", "B", "C", "C"])
    train, held = split_slides(data, "patient", fraction=0.3)
    assert len(held) == 2
    assert {s.patient for s in train}.isdisjoint({s.patient for s in held})
    assert split_slides(data, "auto", fraction=0.3) == (train, held)


def test_auto_falls_back():
    train, held = split_slides(slides([None, None, None]), "auto")
    assert (len(train), len(held)) == (2, 1)
    train, held = split_slides(slides(["A", "A"]), "auto")
    assert (len(train), len(held)) == (1, 1)
    assert split_slides(slides(["A"]), "auto")[1] == []
    assert split_slides(slides(["A", "B"]), None)[1] == []


def test_share_and_seed():
    data = slides(list("ABCDEFGHIJ"))
    assert len(split_slides(data, 0.5)[1]) == 5
    assert len(split_slides(data, 0.99)[1]) == 9
    choices = {tuple(names(split_slides(data, 0.3, seed=s)[1])) for s in range(10)}
    assert len(choices) > 1


def test_by_name():
    data = slides(["A", "B", "B"])
    assert names(split_slides(data, ["B"])[1]) == ["S1", "S2"]
    assert names(split_slides(data, ["S0"])[1]) == ["S0"]


def test_guards():
    data = slides(["A", "B", "B"])
    with pytest.raises(InputError, match="patient 'B' is in training and test"):
        split_slides(data, ["S1"])
    with pytest.raises(InputError, match="'S9', which is no slide or patient"):
        split_slides(data, ["S9"])
    with pytest.raises(InputError, match="no slide to train on"):
        split_slides(data, ["A", "B"])
    with pytest.raises(InputError, match="empty list"):
        split_slides(data, [])
    with pytest.raises(InputError, match=r"one patient only \('A'\)"):
        split_slides(slides(["A", "A"]), "patient")
    with pytest.raises(InputError, match="slide 'S0' lacks"):
        split_slides(slides([None, "B"]), "patient")
    with pytest.raises(InputError, match="validation='slide' is unknown"):
        split_slides(data, "slide")
    with pytest.raises(InputError, match="share between 0 and 1"):
        split_slides(data, 1.5)
