"""The parts that ``make gpu-bundle`` writes: what is left out, and how files are packed."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import gpu_bundle


def test_a_trimmed_wheel_has_the_rest(tmp_path: Path) -> None:
    wheel = tmp_path / "sglang_kernel-0.4.5-cp310-abi3-manylinux2014_x86_64.whl"
    kept = {"sgl_kernel/__init__.py": b"x = 1", "sgl_kernel/sm90/common_ops.abi3.so": b"\x7fELF"}
    with zipfile.ZipFile(wheel, "w") as file:
        for name, data in kept.items():
            file.writestr(name, data)
        file.writestr("sgl_kernel/flash_ops.abi3.so", b"large")
        file.writestr("sgl_kernel/sm100/common_ops.abi3.so", b"other GPU")
    gpu_bundle.trim(wheel)
    with zipfile.ZipFile(wheel) as file:
        assert {name: file.read(name) for name in file.namelist()} == kept


def test_a_wheel_of_which_all_is_used_stays_as_it_is(tmp_path: Path) -> None:
    wheel = tmp_path / "fastapi-0.165.0-py3-none-any.whl"
    wheel.write_bytes(b"not even a zip file")
    gpu_bundle.trim(wheel)
    assert wheel.read_bytes() == b"not even a zip file"


@given(st.lists(st.integers(0, 10), max_size=20))
def test_every_file_is_in_one_part_that_fits(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    files = [folder / str(number) for number in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    parts = gpu_bundle.packed(files, most=10)
    assert sorted(file for part in parts for file in part) == sorted(files)
    assert all(sum(file.stat().st_size for file in part) <= 10 for part in parts)
    # No two parts would fit into one.
    filled = sorted(sum(file.stat().st_size for file in part) for part in parts)
    assert len(filled) < 2 or filled[0] + filled[1] > 10


def test_a_file_that_fits_no_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="large has"):
        gpu_bundle.packed([tmp_path / "large"], most=10)


def test_pins_agree_with_those_of_the_cpu() -> None:
    requirements = gpu_bundle.PINS.parent
    pins = {
        name: dict(re.findall(r"^([\w.-]+)==(\S+)$", (requirements / name).read_text(), re.M))
        for name in ("cpu.txt", "gpu-bundle.txt")
    }
    both = pins["cpu.txt"].keys() & pins["gpu-bundle.txt"].keys()
    assert "sglang" in both and len(both) > 40
    for name in both:
        assert pins["gpu-bundle.txt"][name] == pins["cpu.txt"][name]


def test_with_the_last_part_the_set_up_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, venv = tmp_path / "project", tmp_path / "venv"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "ours"\nversion = "1"\n[tool.setuptools]\npy-modules = ["ours"]\n'
    )
    (project / "ours.py").write_text("")
    for number, name in enumerate(("one", "two"), start=1):
        part = tmp_path / f"part-{number}-of-2"
        part.mkdir()
        info = f"{name}-1.dist-info"
        with zipfile.ZipFile(part / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "part-2-of-2" / "pages.so").write_bytes(b"kernels")
    cache = tmp_path / "cache"
    for name, value in {"ROOT": project, "VENV": venv, "CACHE": cache}.items():
        monkeypatch.setattr(gpu_bundle, name, value)
    gpu_bundle.install(tmp_path / "part-1-of-2")
    assert not (venv / ".set-up").exists() and not cache.exists()
    # Not the old setuptools of a new venv: in earnest a part brings one, here the machine has it.
    pip = [venv / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"]
    subprocess.run(pip, check=True)
    gpu_bundle.install(tmp_path / "part-2-of-2")
    assert (venv / ".set-up").exists()
    assert (cache / "pages.so").read_bytes() == b"kernels"
    # What this Python has is there, too.
    code = "import one, two, ours, torch"
    subprocess.run([venv / "bin" / "python", "-c", code], check=True, cwd=tmp_path)
