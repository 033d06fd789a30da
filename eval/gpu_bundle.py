"""``make gpu-bundle``: what a GPU machine without a network needs to run ``make gpu-check``.

Wheels for its Python with the pins of ``requirements/gpu-bundle.txt``, less the files that are
not used there, and modules compiled beforehand: FlashInfer's, which take minutes each, and our
page kernels. They come in archives of at most 58 MiB, one if it holds all, which may be brought
there and installed one by one, in this tree:

    python3 -m eval.gpu_bundle --install build/gpu-bundle/part-1-of-1.tar.xz

It makes ``.venv`` beside what the machine's ``python3`` has, torch above all. With the last
part in, the Makefile takes the set-up as done.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "requirements" / "gpu-bundle.txt"
BUNDLE = ROOT / "build" / "gpu-bundle"
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache" / "profiles" / "kernels"  # as servers of eval/server.py have it
PART_BYTES = 58 << 20  # a transfer of 64 MiB has room for the tree, too
# pip takes the number of a platform tag literally.
PLATFORMS = ("manylinux1", "manylinux2014", *(f"manylinux_2_{n}" for n in (5, 17, *range(24, 36))))
# Of each distribution, the files that serving a dense model on Hopper does not use.
LEFT_OUT = {
    "sglang_kernel": (
        "sgl_kernel/flash_ops.*", "sgl_kernel/flashmla_ops.*", "sgl_kernel/infllm_ops.*",
        "sgl_kernel/sm100/*",
    ),
    # Without the Rust tree, which reads tensors of another torch as it reads its own's, SGLang
    # takes the one in Python.
    "sglang": (
        "sglang/srt/rust_extensions/*.so", "sglang/srt/mem_cache/rust_tree_core/*.so",
        "sglang/multimodal_gen/test/*",
    ),
    "flashinfer_python": (
        *(f"flashinfer/data/csrc/{name}*" for name in (
            "alphamoe", "blackwell", "cake", "experimental", "fused_moe", "gdn", "kda",
        )),
        "flashinfer/data/cutlass/examples/*", "flashinfer/data/cutlass/python/*",
        "flashinfer/moe_ep/kernel_src/*",
    ),
}  # fmt: skip
# Llama and Qwen import CUTLASS's Python package, 90 MB, with a kernel that only Blackwell runs.
# Elsewhere SGLang asks this much of it.
NO_DUAL_GEMM = """
from enum import IntEnum

MAX_DUAL_GEMM_DECODE_TOKENS = 16
DualGemmQuantMode = IntEnum("DualGemmQuantMode", "STATIC_PER_TENSOR STATIC_PER_TOKEN "
                            "DYNAMIC_PER_TENSOR DYNAMIC_PER_TOKEN UNQUANT", start=0)


def can_use_dual_gemm(*_):
    return False
"""
NO_BLACKWELL = {"sglang": {"sglang/kernels/ops/gemm/cutedsl_dual_gemm.py": NO_DUAL_GEMM}}


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
    """Write ``build/gpu-bundle/part-1-of-N.tar.xz`` and so on."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    BUNDLE.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheels = download(python, work / "wheels")
        for wheel in wheels:
            trim(wheel, {} if arch.startswith("10.") else NO_BLACKWELL)
        if modules != 0:
            add_modules(wheels, arch, modules, work)
        print("Compressing", flush=True)
        for part in pack([*wheels, compile_pages(arch, work)], BUNDLE, PART_BYTES):
            print(f"{part.relative_to(ROOT)}: {part.stat().st_size / (1 << 20):.1f} MiB")


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


def trim(wheel: Path, replaced_in: Mapping[str, Mapping[str, str]]) -> None:
    """Take the files out that are not used there, which pip does not miss, and leave the rest
    uncompressed: all together compress better. ``replaced_in``: text of files of distributions."""
    distribution = wheel.name.split("-")[0]
    patterns, replaced = LEFT_OUT.get(distribution, ()), replaced_in.get(distribution, {})
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w") as new:
        for item in old.infolist():
            if not any(fnmatch.fnmatch(item.filename, pattern) for pattern in patterns):
                data = replaced.get(item.filename, old.read(item))
                new.writestr(item, data, zipfile.ZIP_STORED)
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
    with zipfile.ZipFile(flashinfer, "a") as file:
        for library in sorted(cache.rglob("cached_ops/*/*.so")):
            name = library.parent.name
            file.write(library, f"flashinfer/data/aot/{name}/{name}.so")


def compile_modules(count: int | None) -> None:
    """What a server uses of FlashInfer, or the first ``count``: for attention decode on CUDA cores
    and prefill, which is also decode on tensor cores, for the heads of the tiny model and of an 8B
    one; and norms, whose sources include cuBLAS's headers."""
    import torch
    from flashinfer.jit.attention import gen_batch_decode_module

    # Its wrappers ask for this one; the public ``gen_batch_prefill_module`` has another name.
    from flashinfer.jit.attention.modules import _gen_batch_prefill_primary_module
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module

    def modules() -> Iterator[Any]:
        yield gen_cascade_module()
        if Path(os.environ["CUDA_HOME"], "include", "cublasLt.h").exists():
            yield gen_norm_module()
        else:
            print("No cublasLt.h: norms are compiled there, 45 s before the first prefill")
        for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 128)):
            kind = (dtype, dtype, dtype, torch.int32, dim, dim, 0, False, False)
            yield gen_batch_decode_module(*kind)
            yield _gen_batch_prefill_primary_module("fa2", *kind, False)

    for module in islice(modules(), count):
        print(f"Compiling {module.name}", flush=True)
        module.build(verbose=False)


def compile_pages(arch: str, work: Path) -> Path:
    """Our kernels for that architecture, under the name by which they are found in a cache."""
    from orbitflow_sglang.residency.kernels import architecture, compile_library, library_name

    major, minor = arch.rstrip("a").split(".")  # FlashInfer's name of it
    name = architecture(int(major), int(minor))
    library = work / library_name(name)
    compile_library(library, (name,))
    return library


def pack(files: Sequence[Path], folder: Path, most: int) -> list[Path]:
    """The files in as few archives of at most ``most`` bytes as dealing them out finds. Raises
    ``ValueError`` where one file alone is larger."""
    largest_first = sorted(files, key=lambda file: (-file.stat().st_size, file.name))
    for count in range(1, len(files) + 1):
        parts = [folder / f"part-{number}-of-{count}.tar.xz" for number in range(1, count + 1)]
        for number, part in enumerate(parts):
            with tarfile.open(part, "w:xz") as archive:
                for file in largest_first[number::count]:
                    archive.add(file, file.name)
        if all(part.stat().st_size <= most for part in parts):
            return parts
        for part in parts:
            part.unlink()
    raise ValueError(f"{largest_first[0].name} is too large: a part has at most {most >> 20} MiB")


# --- there --------------------------------------------------------------------


def install(part: Path) -> None:
    """Install a part into ``.venv``; with the last of them this project, too."""
    python = VENV / "bin" / "python"
    if not python.exists():
        create(VENV)
    # The pip that is there: a Python need not be able to put one into a new environment.
    pip = [
        *(sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"),
        *("install", "--quiet", "--no-index", "--no-deps"),
    ]
    marker = VENV / part.name.removesuffix(".tar.xz")
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    if not marker.exists() or marker.read_text() != digest:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(part) as archive:
                archive.extractall(folder, filter="data")
            wheels = sorted(map(str, Path(folder).glob("*.whl")))
            subprocess.run([*pip, "--no-compile", *wheels], check=True)
            for library in Path(folder).glob("*.so"):
                CACHE.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, CACHE)
        marker.write_text(digest)
    number = int(marker.name.rpartition("-")[2])
    if len(list(VENV.glob(f"part-*-of-{number}"))) == number:
        subprocess.run([*pip, "--no-build-isolation", "--editable", str(ROOT)], check=True)
        (VENV / ".set-up").touch()  # the Makefile's stamp


def create(venv: Path) -> None:
    """A virtual environment that also has what this Python has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    # Not --system-site-packages: this Python may be in a virtual environment itself.
    target = sysconfig.get_path("purelib", vars={"base": str(venv)})
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    Path(target, "machine.pth").write_text("".join(f"{path}\n" for path in sorted(here)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
