"""The parts that ``make gpu-bundle`` writes: what is left out, and how files are packed."""

from __future__ import annotations

import re
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
