"""Kernels against their reference, on the CPU: Triton's interpreter, and nvcc as a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orbitflow_sglang.residency import kernels

pytestmark = pytest.mark.unit
# Triton decides when it is imported whether it interprets, so this runs in a process of its own.
SCRIPT = """
import itertools
import torch
from orbitflow_sglang.residency import kernels
from orbitflow_sglang.residency.kernels import TorchKernels, TritonKernels

ours, reference = TritonKernels(), TorchKernels()
chance = torch.Generator().manual_seed(1)

def pages(count, size, dtype):
    return torch.randn((count, size, 2, 12), generator=chance).to(dtype)

def ids(*values):
    return torch.tensor(values, dtype=torch.int32)

kernels.COPY_BLOCKS = 2  # fewer programs than pages
kernels.TRITON_BLOCK = 256  # and less than a page at once
for dtype, size in itertools.product((torch.float32, torch.bfloat16), (1, 16, 64)):
    for target_ids, source_ids, count in (
        (ids(3, 0, 4), ids(1, 5, 2), 3),
        (ids(3, 0, 4), ids(1, -1, 2), 3),  # one is left out
        (ids(3, 0, 4), ids(1, 5, 2), 1),  # only the first
        (ids(3, 0, 4), ids(1, 5, 2), 0),
    ):
        source, before = pages(6, size, dtype), pages(5, size, dtype)
        wanted, found = before.clone(), before.clone()
        for copier, target in ((reference, wanted), (ours, found)):
            copier.copy_pages(target, source, target_ids, source_ids, ids(count))
        assert torch.equal(wanted, found), (dtype, size, count)
        assert count == 0 or not torch.equal(found, before)
    rows = torch.randn((4 * size + 3, 2, 12), generator=chance).to(dtype)
    wanted = pages(5, size, dtype)
    found = wanted.clone()
    for copier, target in ((reference, wanted), (ours, found)):
        copier.copy_rows(target, rows, ids(4, 1), ids(2, size + 3), ids(2))
    assert torch.equal(wanted, found)
    assert torch.equal(found[4], rows[2 : 2 + size])

layers, size = 3, 4
table = torch.randint(0, 1000, (layers, 50), generator=chance, dtype=torch.int32)
req_to_token = torch.randint(0, 50, (6, 1200), generator=chance, dtype=torch.int32) * size
rows, indptr = ids(4, 0, 2), ids(0, 260, 260, 277)
wanted = torch.zeros((layers, 300), dtype=torch.int32)
found = wanted.clone()
for indexer, indices in ((reference, wanted), (ours, found)):
    indexer.layer_indices(indices, table, req_to_token, rows, indptr, size)
assert torch.equal(wanted, found) and found[:, 276].any() and not found[:, 277:].any()
assert int(found[2, 1]) == int(table[2, int(req_to_token[4, size]) // size])
print("equal")
"""


def test_triton_kernels_do_what_the_reference_does() -> None:
    environment = dict(os.environ) | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "equal"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_compile_for_gpus_that_are_not_here(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    module = kernels._load_module(kernels.SOURCES / "pages_triton.py")
    for name, pointers in (("copy_pages_kernel", 5), ("copy_rows_kernel", 5),
                           ("layer_indices_kernel", 5)):  # fmt: skip
        kernel = getattr(module, name)
        constants = {"BLOCK": kernels.TRITON_BLOCK}
        wide = ("target", "source")
        numbers = ("words", "words_per_row", "stride", "pages", "row_tokens", "page_size")
        signature = {
            argument: "constexpr" if argument in constants
            else "i32" if argument in numbers
            else "*i64" if argument in wide else "*i32"
            for argument in kernel.arg_names
        }  # fmt: skip
        assert sum(kind.startswith("*") for kind in signature.values()) == pointers
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_cuda_kernels_compile(architecture: str, tmp_path: Path) -> None:
    library = tmp_path / "pages.so"
    kernels.compile_library(library, (architecture,))
    found = kernels.CUDAKernels(library)._library
    for name in ("copy_pages", "copy_runs", "copy_rows", "layer_indices"):
        assert getattr(found, f"orbitflow_{name}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_source_that_does_not_compile_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pages.cu").write_text("not C++")
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        kernels.compile_library(tmp_path / "pages.so", ("sm_90a",))
    assert not (tmp_path / "pages.so").exists()
