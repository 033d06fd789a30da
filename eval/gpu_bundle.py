"""``make gpu-bundle``: what a GPU machine without a network needs to run ``make gpu-check``.

Wheels for its Python with the pins of ``requirements/gpu-bundle.txt``, less the files that are
not used there, and modules compiled beforehand: FlashInfer's, which take minutes each, and our
page kernels. They come in parts of at most 52 MiB, which may be brought there and installed one
by one, in this tree:

    python3 -m eval.gpu_bundle --install build/gpu-bundle/part-1-of-2

It makes ``.venv`` beside what the machine's ``python3`` has, torch above all. With the last
part in, the Makefile takes the set-up as done.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "requirements" / "gpu-bundle.txt"
BUNDLE = ROOT / "build" / "gpu-bundle"
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache" / "profiles" / "kernels"  # as servers of eval/server.py have it
PART_BYTES = 52 << 20  # a transfer of 64 MiB has room for the tree, too
# pip takes the number of a platform tag literally.
PLATFORMS = ("manylinux1", "manylinux2014", *(f"manylinux_2_{n}" for n in (5, 17, *range(24, 36))))
# Of each distribution, the files that serving a dense model on Hopper does not use.
LEFT_OUT = {
    "sglang_kernel": (
        "sgl_kernel/flash_ops.*", "sgl_kernel/flashmla_ops.*", "sgl_kernel/infllm_ops.*",
        "sgl_kernel/sm100/*",
    ),
    "sglang": ("sglang/srt/rust_extensions/*.so", "sglang/multimodal_gen/test/*"),
    "flashinfer_python": (
        *(f"flashinfer/data/csrc/{name}*" for name in (
            "alphamoe", "blackwell", "cake", "experimental", "fused_moe", "gdn", "kda",
        )),
        "flashinfer/data/cutlass/examples/*", "flashinfer/data/cutlass/python/*",
        "flashinfer/moe_ep/kernel_src/*",
    ),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.gpu_bundle", description=(__doc__ or "").replace("``", "")
    )
    add = parser.add_argument
    add("--install", type=Path, metavar="PART", help="a part, on the machine it was made for")
    add("--python", default="3.12", metavar="X.Y", help="the machine's (%(default)s)")
    add("--arch", default="9.0a", help="of its GPU (%(default)s)")
    add("--modules", type=int, metavar="N", help="of FlashInfer's, compile the first N (all)")
    options = parser.parse_args(argv)
    if options.install is not None:
        install(options.install)
    else:
        make(options.python, options.arch, options.modules)
    return 0


# --- here ---------------------------------------------------------------------


def make(python: str, arch: str, modules: int | None) -> None:
    """Write ``build/gpu-bundle/part-1-of-N`` and so on."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheels = download(python, work / "wheels")
        for wheel in wheels:
            trim(wheel)
        if modules != 0:
            add_modules(wheels, arch, modules, work)
        parts = packed([*wheels, compile_pages(arch, work)], PART_BYTES)
        for number, part in enumerate(parts, start=1):
            target = BUNDLE / f"part-{number}-of-{len(parts)}"
            target.mkdir(parents=True)
            for file in part:
                shutil.copy(file, target)
            size = sum(file.stat().st_size for file in part) / (1 << 20)
            print(f"{target.relative_to(ROOT)}: {len(part)} files, {size:.1f} MiB")


def download(python: str, target: Path) -> list[Path]:
    """The pinned wheels, for that Python on x86-64."""
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"),
        *("--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *(word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")),
        *("--dest", str(target), "-r", str(PINS)),
    ]
    subprocess.run(command, check=True)
    return sorted(target.glob("*.whl"))


def trim(wheel: Path) -> None:
    """Take the files out that are not used there; pip does not miss them."""
    patterns = LEFT_OUT.get(wheel.name.split("-")[0], ())
    if not patterns:
        return
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w") as new:
        for item in old.infolist():
            if not any(fnmatch.fnmatch(item.filename, pattern) for pattern in patterns):
                new.writestr(item, old.read(item), zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def add_modules(wheels: Sequence[Path], arch: str, count: int | None, work: Path) -> None:
    """Compile FlashInfer's modules and put them where it looks before it compiles."""
    site, cache, stubs = work / "site", work / "cache", work / "stubs"
    flashinfer, pynvml = (
        next(wheel for wheel in wheels if wheel.name.startswith(name))
        for name in ("flashinfer_python-", "nvidia_ml_py-")
    )
    for wheel in (flashinfer, pynvml):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    stubs.mkdir()  # its modules link with the driver, which is only where there is a GPU
    subprocess.run(
        ["gcc", "-shared", "-x", "c", os.devnull, "-o", str(stubs / "libcuda.so")], check=True
    )
    environment = (
        {"CUDA_HOME": "/usr/local/cuda"}
        | os.environ
        | {
            "PYTHONPATH": str(site),
            "FLASHINFER_CUDA_ARCH_LIST": arch,
            "FLASHINFER_WORKSPACE_BASE": str(cache),
            "LIBRARY_PATH": str(stubs),
        }
    )
    code = f"from eval.gpu_bundle import compile_modules; compile_modules({count})"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    with zipfile.ZipFile(flashinfer, "a", zipfile.ZIP_DEFLATED) as file:
        for library in sorted(cache.rglob("cached_ops/*/*.so")):
            name = library.parent.name
            file.write(library, f"flashinfer/data/aot/{name}/{name}.so")


def compile_modules(count: int | None) -> None:
    """What attention uses of FlashInfer, or the first ``count``: decode on CUDA cores and prefill,
    which is also decode on tensor cores, for the heads of the tiny model and of an 8B one."""
    import torch
    from flashinfer.jit.attention import gen_batch_decode_module

    # Its wrappers ask for this one; the public ``gen_batch_prefill_module`` has another name.
    from flashinfer.jit.attention.modules import _gen_batch_prefill_primary_module
    from flashinfer.jit.cascade import gen_cascade_module

    def modules() -> Iterator[Any]:
        yield gen_cascade_module()
        for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 128)):
            kind = (dtype, dtype, dtype, torch.int32, dim, dim, 0, False, False)
            yield gen_batch_decode_module(*kind)
            yield _gen_batch_prefill_primary_module("fa2", *kind, False)

    for module in islice(modules(), count):
        print(f"Compiling {module.name}", flush=True)
        module.build(verbose=False)


def compile_pages(arch: str, work: Path) -> Path:
    """Our kernels for that architecture, under the name by which they are found in a cache."""
    from orbitflow_sglang.residency.kernels import compile_library, library_name

    architecture = f"sm_{arch.replace('.', '')}"
    library = work / library_name(architecture)
    compile_library(library, (architecture,))
    return library


def packed(files: Sequence[Path], most: int) -> list[list[Path]]:
    """The files in as few parts as first-fit finds. Raises ``ValueError`` for one too large."""
    parts: list[list[Path]] = []
    for file in sorted(files, key=lambda one: (-one.stat().st_size, one.name)):
        size = file.stat().st_size
        if size > most:
            raise ValueError(f"{file.name} has {size >> 20} MiB, a part at most {most >> 20}")
        room = (p for p in parts if sum(f.stat().st_size for f in p) + size <= most)
        part = next(room, None)
        if part is None:
            parts.append(part := [])
        part.append(file)
    return parts


# --- there --------------------------------------------------------------------


def install(part: Path) -> None:
    """Install a part into ``.venv``; with the last of them this project, too."""
    python = VENV / "bin" / "python"
    if not python.exists():
        create(VENV)
    pip = [
        *(str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
        *("--no-index", "--no-deps"),
    ]
    if not (VENV / part.name).exists():
        wheels = [str(wheel) for wheel in sorted(part.glob("*.whl"))]
        subprocess.run([*pip, "--no-compile", *wheels], check=True)
        for library in part.glob("*.so"):
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, CACHE)
        (VENV / part.name).touch()
    number = int(part.name.rpartition("-")[2])
    if len(list(VENV.glob(f"part-*-of-{number}"))) == number:
        subprocess.run([*pip, "--no-build-isolation", "--editable", str(ROOT)], check=True)
        (VENV / ".set-up").touch()  # the Makefile's stamp


def create(venv: Path) -> None:
    """A virtual environment that also has what this Python has."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    # Not --system-site-packages: this Python may be in a virtual environment itself.
    target = sysconfig.get_path("purelib", vars={"base": str(venv)})
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    Path(target, "machine.pth").write_text("".join(f"{path}\n" for path in sorted(here)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
