"""The patch tool on a scratch copy of the files that it changes in the installed SGLang."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orbitflow_sglang import SUPPORTED_SGLANG, patches
from orbitflow_sglang.patches import Refused, change

pytestmark = pytest.mark.unit
PATCHES = patches.load()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the original files, whatever state the installation is in."""
    installed = patches.installed()
    for patch in PATCHES:
        path = patch.path(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(patch.path(installed), path)
    change(PATCHES, tmp_path, "original")
    return tmp_path


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_there_is_a_patch_and_each_says_why_and_until_when() -> None:
    assert [patch.name for patch in PATCHES][1] == patches.TOKENIZER_WORKERS
    assert len({patch.file for patch in PATCHES}) == len(PATCHES)  # one state for each file
    for source in patches._SOURCES:
        for file in source.rglob("*.patch"):
            text = file.read_text(encoding="utf-8")
            assert "\nWhy: " in text and "\nCan go when: " in text


def test_revert_leaves_every_file_as_it_was(root: Path) -> None:
    before = content(root)
    done = change(PATCHES, root, "patched")
    assert len(done) == len(PATCHES) and all(line.startswith("patched: ") for line in done)
    assert all(content(root)[patch.file] != before[patch.file] for patch in PATCHES)
    assert change(PATCHES, root, "patched") == ["nothing to do: every file is patched"]
    assert patches.report(PATCHES, root)[1]
    change(PATCHES, root, "original")
    assert content(root) == before
    assert change(PATCHES, root, "original") == ["nothing to do: every file is original"]
    assert not patches.report(PATCHES, root)[1]


def test_a_dry_run_says_what_it_would_do_and_does_nothing(root: Path) -> None:
    before = content(root)
    done = change(PATCHES, root, "patched", dry_run=True)
    assert all(line.startswith("would be patched: ") for line in done)
    assert content(root) == before


@pytest.mark.parametrize("wanted", ["patched", "original"])
def test_a_file_that_somebody_else_changed_is_refused_and_nothing_is_touched(
    root: Path, wanted: patches.State
) -> None:
    changed = PATCHES[-1].path(root)
    changed.write_bytes(changed.read_bytes() + b"\n# mine\n")
    before = content(root)
    with pytest.raises(Refused, match=rf"{PATCHES[-1].file} is neither.*reinstall"):
        change(PATCHES, root, wanted)
    assert content(root) == before


@pytest.mark.parametrize("wanted", ["patched", "original"])
def test_a_run_that_was_killed_midway_is_finished(root: Path, wanted: patches.State) -> None:
    before = content(root)
    change(PATCHES[:1], root, "patched")
    left = patches._temporary(PATCHES[0].path(root))
    left.write_bytes(b"half a file")
    done = change(PATCHES, root, wanted)
    assert "cut off" in done[0] and len(done) == 2
    change(PATCHES, root, "original")
    assert content(root) == before  # and nothing lies about


def test_a_missing_file_is_refused(root: Path) -> None:
    PATCHES[0].path(root).unlink()
    with pytest.raises(Refused, match=r"No such file.*reinstall"):
        change(PATCHES, root, "patched")


def test_permissions_stay(root: Path) -> None:
    path = PATCHES[0].path(root)
    path.chmod(0o640)
    change(PATCHES, root, "patched")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_patch_that_does_not_do_what_it_says_is_refused(root: Path) -> None:
    import dataclasses

    wrong = dataclasses.replace(PATCHES[0], after="0" * 64)
    with pytest.raises(Refused, match="does not lead where"):
        change([wrong], root, "patched")


def test_another_version_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.99")
    wanted = f"install sglang=={SUPPORTED_SGLANG}"
    with pytest.raises(Refused, match=rf"found sglang 0\.5\.99: {wanted}"):
        patches.installed()
    with pytest.raises(Refused, match=r"no patches for sglang 0\.5\.99"):
        patches.load("0.5.99")


def test_the_command_on_the_installation_and_its_exit_status() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orbitflow_sglang.patches", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))

    checked = run("check")
    assert checked.returncode in (0, 1)
    assert len(checked.stdout.splitlines()) == len(PATCHES)
    dry = run("apply", "--dry-run")
    assert dry.returncode == 0
    assert ("nothing to do" in dry.stdout) == (checked.returncode == 0)
    assert run("undo").returncode == 2
