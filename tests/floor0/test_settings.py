from __future__ import annotations

import logging
from pathlib import Path

import pytest

from stfm._errors import InputError
from stfm._logging import logger
from stfm._settings import Settings, settings


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STFM_CACHE", str(tmp_path))
    assert Settings().cache_dir == tmp_path
    monkeypatch.delenv("STFM_CACHE")
    assert "stfm" in Settings().cache_dir.parts


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_follows_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("STFM_OFFLINE", value)
    assert Settings().offline is expected


def test_mirror_is_none_when_empty(monkeypatch):
    monkeypatch.setenv("STFM_MIRROR", "")
    assert Settings().mirror is None


def test_override_puts_values_back_even_after_an_error():
    before = settings.cache_dir

    def fail() -> None:
        with settings.override(cache_dir="elsewhere", offline=True):
            assert settings.cache_dir == Path("elsewhere")
            assert settings.offline is True
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert settings.cache_dir == before


@pytest.mark.parametrize(("name", "meant"), [("cache", "cache_dir"), ("ofline", "offline"), ("Device", "device")])
def test_an_unknown_setting_is_refused(name, meant):
    with pytest.raises(InputError, match=f"no setting '{name}'. Did you mean.*'{meant}'"):
        setattr(settings, name, "x")
    assert not hasattr(settings, name)


def test_override_refuses_an_unknown_setting():
    with pytest.raises(InputError, match="no setting 'cache'"), settings.override(cache="x"):
        pass


@pytest.mark.parametrize(("name", "value"), [("device", "tpu"), ("verbosity", 7)])
def test_bad_values_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        setattr(Settings(), name, value)


def test_verbosity_attaches_one_handler():
    own = Settings()
    own.verbosity = 3
    own.verbosity = 2
    shown = [h for h in logger.handlers if getattr(h, "of_stfm", False)]
    try:
        assert len(shown) == 1
        assert logger.level == logging.INFO
    finally:
        for handler in shown:
            logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_repr_names_every_setting():
    assert {"cache_dir", "offline", "mirror", "device", "verbosity"} <= set(repr(Settings()).replace(" =", "").split())
