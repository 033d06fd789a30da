"""Files of cost profiles: where they are, what is refused, and that they are whole or absent."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from orbitflow_sglang.caching import CACHE_ENV, cache_folder
from orbitflow_sglang.config import ConfigError
from orbitflow_sglang.engine.profile_files import (
    cache_file,
    read_cached,
    read_given,
    write_cached,
)
from orbitflow_sglang.planner.cost_model import ComputeModel, Profile, TransferModel

pytestmark = pytest.mark.unit

PROFILE = Profile(
    model="m",
    device="d",
    page_bytes=16_384,
    compute=ComputeModel(8, 1e-3, 1e-4, 1e-7, 1.0),
    h2d=TransferModel(1e-5, 1e-5, 1.0),
    d2h=TransferModel(1e-5, 2e-5, 1.0),
    prefill_tokens_per_s=4000.0,
)
KEY = {"model": "m", "threads": 2, "link_gb_per_s": None, "points": [(1, 64), (8, 8)]}


def written(folder: Path, profile: Profile = PROFILE) -> Path:
    path = folder / "profile.json"
    path.write_bytes(profile.dump())
    return path


# --- where --------------------------------------------------------------------


def test_the_folder_is_the_one_given_else_that_of_all_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ORBITFLOW_CACHE_DIR", raising=False)
    assert cache_folder() == Path("/home/user/.cache/orbitflow_sglang")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/orbitflow_sglang")
    monkeypatch.setenv("ORBITFLOW_CACHE_DIR", "/ours")
    assert cache_folder() == Path("/ours")


def test_equal_keys_have_one_file_and_any_difference_another() -> None:
    reordered = dict(reversed(KEY.items()))
    assert cache_file(KEY) == cache_file(reordered)
    for name, value in (("model", "n"), ("threads", 4), ("link_gb_per_s", 0.05), ("more", 1)):
        assert cache_file(KEY | {name: value}) != cache_file(KEY)


# --- kept ---------------------------------------------------------------------


def test_a_kept_profile_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet.json"
    write_cached(path, PROFILE)
    assert read_cached(path, 8, 16_384) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_there_need_not_be_one(tmp_path: Path) -> None:
    assert read_cached(tmp_path / "profile.json", 8, 16_384) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version": 99}', b"\xff\xfe", b"null"])
def test_a_broken_one_is_ignored_and_written_anew(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text)
    assert read_cached(path, 8, 16_384) is None
    assert str(path) in caplog.text
    write_cached(path, PROFILE)
    assert read_cached(path, 8, 16_384) == PROFILE


def test_a_folder_in_its_place_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "profile.json").mkdir()
    assert read_cached(tmp_path / "profile.json", 8, 16_384) is None


@pytest.mark.parametrize(("layers", "page_bytes"), [(9, 16_384), (8, 8192)])
def test_one_of_another_model_is_ignored(tmp_path: Path, layers: int, page_bytes: int) -> None:
    assert read_cached(written(tmp_path), layers, page_bytes) is None


def test_what_cannot_be_written_whole_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    path = written(tmp_path)
    monkeypatch.setattr(os, "replace", fail)
    write_cached(path, replace(PROFILE, model="other"))
    assert read_cached(path, 8, 16_384) == PROFILE
    assert list(tmp_path.iterdir()) == [path], "nothing half written stays behind"
    assert "No space left" in caplog.text


def test_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    write_cached(tmp_path / "file" / "profile.json", PROFILE)
    assert "cannot keep its cost profile" in caplog.text


# --- given --------------------------------------------------------------------


def refusal(path: Path, layers: int = 8, page_bytes: int | None = 16_384) -> str:
    with pytest.raises(ConfigError) as caught:
        read_given(str(path), layers, page_bytes)
    message = str(caught.value)
    assert message.startswith(f"--orbitflow-profile {path}: ")
    assert "leave the flag out to have it measured" in message
    assert "\n" not in message
    return message


def test_a_given_profile_is_read(tmp_path: Path) -> None:
    assert read_given(str(written(tmp_path)), 8, 16_384) == PROFILE
    assert read_given(str(written(tmp_path)), 8) == PROFILE, "pages are not known at first"


def test_a_given_file_must_be_there(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.json")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


def test_a_given_file_must_be_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{")
    assert "not JSON" in refusal(path)
    path.write_bytes(PROFILE.dump().replace(b"constant_s", b"constant"))
    assert "compute.constant: no such key" in refusal(path)


def test_a_given_profile_must_be_of_this_model(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert "with 8 layers, and this one has 12" in refusal(path, layers=12)
    assert "16384 bytes, and here they have 8192" in refusal(path, page_bytes=8192)


def test_the_variable_is_the_one_that_is_documented() -> None:
    assert CACHE_ENV in str(cache_folder.__doc__)
