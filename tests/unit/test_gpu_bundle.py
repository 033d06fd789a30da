"""The parts that ``make gpu-bundle`` writes: what is left out, and how files are packed."""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

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
    gpu_bundle.trim(wheel, {})
    with zipfile.ZipFile(wheel) as file:
        assert {name: file.read(name) for name in file.namelist()} == kept


def test_what_stands_in_for_a_kernel_of_blackwell_has_its_names(tmp_path: Path) -> None:
    """SGLang is looked at, not imported: it needs CUDA's packages."""
    ((inside, text),) = gpu_bundle.NO_BLACKWELL["sglang"].items()
    wheel = tmp_path / "sglang-0.5.23-cp312-cp312-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(inside, "import cutlass")
    gpu_bundle.trim(wheel, gpu_bundle.NO_BLACKWELL)
    with zipfile.ZipFile(wheel) as file:
        assert file.read(inside).decode() == text
    ours: dict[str, Any] = {}
    exec(text, ours)
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None and sglang.origin is not None
    theirs = ast.parse((Path(sglang.origin).parents[1] / inside).read_text())
    constants: dict[str, Any] = {
        ast.unparse(node.targets[0]): node.value.value
        for node in theirs.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    name = "MAX_DUAL_GEMM_DECODE_TOKENS"
    assert ours[name] == constants[name]
    modes = next(node for node in theirs.body if isinstance(node, ast.ClassDef))
    wanted = [
        (ast.unparse(node.targets[0]), ast.literal_eval(node.value))
        for node in modes.body
        if isinstance(node, ast.Assign)
    ]
    assert [(mode.name, mode.value) for mode in ours[modes.name]] == wanted
    assert ours["can_use_dual_gemm"](1, 128, 128, ours[modes.name].UNQUANT) is False


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_every_file_is_in_one_part_that_fits(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    content = {str(number): random.Random(number).randbytes(n) for number, n in enumerate(sizes)}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    parts = gpu_bundle.pack(list(map(folder.joinpath, content)), folder, most=5000)
    found = {}
    for part in parts:
        assert part.stat().st_size <= 5000
        with tarfile.open(part) as archive:
            for name in archive.getnames():
                assert name not in found
                member = archive.extractfile(name)
                assert member is not None
                found[name] = member.read()
    assert found == content
    assert len(parts) == 1 or sum(sizes) > 2500
    assert set(folder.iterdir()) == {*parts, *map(folder.joinpath, content)}


def test_a_file_that_fits_no_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(random.Random(0).randbytes(2000))
    with pytest.raises(ValueError, match="large is too large"):
        gpu_bundle.pack([tmp_path / "large"], tmp_path, most=1000)


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
    (tmp_path / "pages.so").write_bytes(b"kernels")
    for name in ("one", "two"):
        info = f"{name}-1.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    inside = {1: ["one-1-py3-none-any.whl"], 2: ["two-1-py3-none-any.whl", "pages.so"]}
    for number, files in inside.items():
        with tarfile.open(tmp_path / f"part-{number}-of-2.tar.xz", "w:xz") as archive:
            for file in files:
                archive.add(tmp_path / file, file)
    cache = tmp_path / "cache"
    for name, value in {"ROOT": project, "VENV": venv, "CACHE": cache}.items():
        monkeypatch.setattr(gpu_bundle, name, value)
    gpu_bundle.install(tmp_path / "part-1-of-2.tar.xz")
    assert not (venv / ".set-up").exists() and not cache.exists()
    gpu_bundle.install(tmp_path / "part-2-of-2.tar.xz")
    assert (venv / ".set-up").exists()
    assert (cache / "pages.so").read_bytes() == b"kernels"
    # Another part of that name is installed, and the same one not again.
    with tarfile.open(tmp_path / "part-2-of-2.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "two-1-py3-none-any.whl", "two-1-py3-none-any.whl")
        (tmp_path / "pages.so").write_bytes(b"others")
        archive.add(tmp_path / "pages.so", "pages.so")
    gpu_bundle.install(tmp_path / "part-2-of-2.tar.xz")
    assert (cache / "pages.so").read_bytes() == b"others"
    (cache / "pages.so").unlink()
    gpu_bundle.install(tmp_path / "part-2-of-2.tar.xz")
    assert not (cache / "pages.so").exists()
    # What this Python has is there, too.
    code = "import one, two, ours, torch"
    subprocess.run([venv / "bin" / "python", "-c", code], check=True, cwd=tmp_path)
