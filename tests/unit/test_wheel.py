"""What the wheel has inside, and that the documents and images agree with the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from orbitflow_sglang import SUPPORTED_SGLANG

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
BUILT = ("orbitflow_sglang", "patches", "kernels", "docs/grafana")  # what a wheel is made of
SHIPPED = {
    "patches": "orbitflow_sglang/_patches",
    "kernels": "orbitflow_sglang/_kernels",
    "docs/grafana": "orbitflow_sglang/_grafana",
}
# Commands of the documents: the file that runs each, and text in it.
RUN_BY = {
    "make serve": "tests/engine/test_entry_points.py::test_make_serve",
    "make test": ".ci/run::make test",
    "python -m sglang.launch_server": "eval/server.py::sglang.launch_server",  # all of engine/
    "python -m build --wheel": "tests/engine/test_wheel_installed.py::--wheel",
    "pip install --no-deps": "tests/engine/test_wheel_installed.py::--no-deps",
    "python -m orbitflow_sglang.patches apply": "tests/engine/test_patched.py::apply",
    "python -m orbitflow_sglang.patches check": "tests/engine/test_patched.py::check",
    "python -m orbitflow_sglang.patches revert": "tests/engine/test_patched.py::revert",
    "docker build": "docker/test_image.sh::buildah bud",
    "docker run": "docker/test_image.sh::buildah run",
}
SOURCES = ("*.patch", "*.json", "*.yaml", "*.cu", "*.py")


def test_the_wheel_has_every_module_patch_and_dashboard(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in BUILT:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(source).as_posix()
              for path in (source / "orbitflow_sglang").rglob("*.py")}  # fmt: skip
    for folder, place in SHIPPED.items():
        files = [path for kind in SOURCES for path in (source / folder).rglob(kind)]
        wanted |= {f"{place}/{path.relative_to(source / folder).as_posix()}" for path in files}
    assert inside == wanted


def test_images_are_short_unprivileged_and_of_the_supported_version() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        text = (ROOT / "docker" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 30
        for instruction in ("ARG BASE=", "FROM ${BASE}", "USER orbitflow", "HEALTHCHECK",
                            "--enable-orbitflow", "docker/install.sh"):  # fmt: skip
            assert instruction in text, (name, instruction)
    assert f"sglang:v{SUPPORTED_SGLANG}" in (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")


def test_everything_that_the_image_needs_is_sent_to_its_build() -> None:
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in (*BUILT, "pyproject.toml", "README.md", "LICENSE", "requirements", "docker"):
        assert f"!{path}" in allowed
    script = (ROOT / "docker/install.sh").read_text(encoding="utf-8")
    torch = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert torch and torch[0] in script
    assert subprocess.run(["sh", "-n", str(ROOT / "docker/install.sh")]).returncode == 0
    assert subprocess.run(["sh", "-n", str(ROOT / "docker/test_image.sh")]).returncode == 0


def test_development_tools_are_pinned_alike_in_both_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").splitlines()
    assert set(project["optional-dependencies"]["dev"]) <= set(pinned)


def test_every_command_of_readme_and_installation_is_named_by_what_runs_it() -> None:
    found = {command for name in ("README.md", "docs/install.md") for command in commands(name)}
    unknown = {one for one in found if not any(one.startswith(known) for known in RUN_BY)}
    gone = {known for known in RUN_BY if not any(one.startswith(known) for one in found)}
    assert not unknown and not gone
    for place in RUN_BY.values():
        file, _, name = place.partition("::")
        assert name in (ROOT / file).read_text(encoding="utf-8"), place


def commands(document: str) -> list[str]:
    """Of the blocks of code, but for drawings and Python."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("make ", "pip ", "python ", "docker "))]


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        used = re.findall(
            r"`make (?:-s )?([a-z-]+)|^make ([a-z-]+)", path.read_text(), re.MULTILINE
        )
        named = {one or other for one, other in used}
        assert named <= targets, (path.name, named - targets)
