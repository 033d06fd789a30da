"""Kernels that move pages and build page indices: in CUDA, in Triton, and in plain PyTorch.

The CUDA ones (``kernels/pages.cu``) are compiled with nvcc once for a device and kept in the
cache, or brought along compiled; Triton's (``kernels/pages_triton.py``) need no compiler; what
either has to do is what ``TorchKernels`` does. All take ids and counts in device memory and
launch on the current stream, so that they can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = next(
    (path for path in (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels") if path.exists()),
    _PACKAGE / "_kernels",
)
PREBUILT_ENV = "ORBITFLOW_KERNELS"  # a library that was compiled elsewhere
CUDA_ALIGNMENT = 16  # bytes that the CUDA kernels copy at once
COPY_BLOCKS = 32  # thread blocks of a copy: enough to fill a link, few of a GPU's processors
INDEX_BLOCKS = 4  # for each layer of each request
TRITON_BLOCK = 1024  # words, of at most 8 bytes, that a program has on their way at once


class PageKernels(Protocol):
    """Launches on the current stream. Tensors of pages are ``[pages, ...]`` and contiguous; ids
    int32, ``count`` one int32, in device memory. Either side may be pinned host memory."""

    name: str

    def copy_pages(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        source_ids: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """``target[target_ids[i]] = source[source_ids[i]]`` for i < count; source -1: not."""

    def copy_runs(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, of: np.ndarray
    ) -> None:
        """``target[to[i]] = source[of[i]]``, by one copy for each run in which both ids go up by
        one; the ids lie in host memory, int64."""

    def copy_rows(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        first_rows: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """``target[target_ids[i]]``, a page, = the rows of ``source`` from ``first_rows[i]``."""

    def layer_indices(
        self,
        indices: torch.Tensor,
        table: torch.Tensor,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        indptr: torch.Tensor,
        page_size: int,
    ) -> None:
        """``indices[l, indptr[r] + k] = table[l, p]``, p the page of token k * page_size of
        request r, whose slots are ``req_to_token[rows[r]]``. Indices ``[layers, positions]``."""


def run_begins(to: np.ndarray, of: np.ndarray) -> list[int]:
    """Where a stretch begins in which both ids go up by one."""
    if not len(to):
        return []
    broken = (np.diff(to) != 1) | (np.diff(of) != 1)
    begins: list[int] = np.concatenate([[0], np.flatnonzero(broken) + 1]).tolist()
    return begins


class _Runs:
    """By PyTorch, which takes ten times as long to ask for a copy."""

    def copy_runs(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, of: np.ndarray
    ) -> None:
        begins = run_begins(to, of)
        for begin, end in zip(begins, [*begins[1:], len(to)], strict=True):
            count = int(end - begin)
            t, s = int(to[begin]), int(of[begin])
            target[t : t + count].copy_(source[s : s + count], non_blocking=True)


class TorchKernels(_Runs):
    """What the others have to do. Reads counts on the host, so it cannot be captured."""

    name = "torch"

    def copy_pages(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        source_ids: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        pages = int(count)
        goals, origins = target_ids[:pages].long(), source_ids[:pages].long()
        wanted = origins >= 0
        values = source[origins[wanted].to(source.device)]
        target[goals[wanted].to(target.device)] = values.to(target.device)

    def copy_rows(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        first_rows: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        pages, size = int(count), target.shape[1]
        rows = first_rows[:pages, None].long() + torch.arange(size, device=first_rows.device)
        goals = target_ids[:pages].long().to(target.device)
        target[goals] = source[rows.to(source.device)].to(target.device)

    def layer_indices(
        self,
        indices: torch.Tensor,
        table: torch.Tensor,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        indptr: torch.Tensor,
        page_size: int,
    ) -> None:
        bounds = indptr.tolist()
        for number, row in enumerate(rows.tolist()):
            begin, end = bounds[number], bounds[number + 1]
            slots = req_to_token[row, : (end - begin) * page_size : page_size]
            indices[:, begin:end] = table[:, (slots // page_size).long()]


class TritonKernels(_Runs):
    """``kernels/pages_triton.py``."""

    name = "triton"

    def __init__(self) -> None:
        self._module = _load_module(SOURCES / "pages_triton.py")

    def copy_pages(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        source_ids: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        goal, origin = _as_words(target), _as_words(source)
        self._module.copy_pages_kernel[(COPY_BLOCKS,)](
            goal, origin, target_ids, source_ids, count, goal.shape[1], TRITON_BLOCK
        )

    def copy_rows(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        first_rows: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        goal, origin = _as_words(target), _as_words(source)
        words = goal.shape[1]
        self._module.copy_rows_kernel[(COPY_BLOCKS,)](
            goal, origin, target_ids, first_rows, count, words, words // target.shape[1],
            TRITON_BLOCK,
        )  # fmt: skip

    def layer_indices(
        self,
        indices: torch.Tensor,
        table: torch.Tensor,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        indptr: torch.Tensor,
        page_size: int,
    ) -> None:
        longest = req_to_token.shape[1] // page_size + 1
        grid = (-(-longest // TRITON_BLOCK), len(rows), len(table))
        self._module.layer_indices_kernel[grid](
            indices, indices.stride(0), table, table.shape[1], req_to_token,
            req_to_token.stride(0), rows, indptr, page_size, TRITON_BLOCK,
        )  # fmt: skip


class CUDAKernels:
    """``kernels/pages.cu``, from a compiled library. Raises ``ValueError`` for pages whose
    size is not a multiple of 16 bytes."""

    name = "cuda"

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def copy_pages(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        source_ids: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        self._call(
            self._library.orbitflow_copy_pages, _pointer(target), _pointer(source),
            _pointer(target_ids), _pointer(source_ids), _pointer(count),
            ctypes.c_int64(_page_bytes(target)), ctypes.c_int32(COPY_BLOCKS),
        )  # fmt: skip

    def copy_runs(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, of: np.ndarray
    ) -> None:
        to, of = (np.ascontiguousarray(ids, dtype=np.int64) for ids in (to, of))
        self._call(
            self._library.orbitflow_copy_runs, _pointer(target), _pointer(source),
            ctypes.c_void_p(to.ctypes.data), ctypes.c_void_p(of.ctypes.data),
            ctypes.c_int64(len(to)), ctypes.c_int64(_page_bytes(target)),
        )  # fmt: skip

    def copy_rows(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        target_ids: torch.Tensor,
        first_rows: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        page = _page_bytes(target)
        self._call(
            self._library.orbitflow_copy_rows, _pointer(target), _pointer(source),
            _pointer(target_ids), _pointer(first_rows), _pointer(count), ctypes.c_int64(page),
            ctypes.c_int64(page // target.shape[1]), ctypes.c_int32(COPY_BLOCKS),
        )  # fmt: skip

    def layer_indices(
        self,
        indices: torch.Tensor,
        table: torch.Tensor,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        indptr: torch.Tensor,
        page_size: int,
    ) -> None:
        layers, pages = table.shape
        self._call(
            self._library.orbitflow_layer_indices, _pointer(indices),
            ctypes.c_int64(indices.stride(0)), _pointer(table), ctypes.c_int64(layers),
            ctypes.c_int64(pages), _pointer(req_to_token),
            ctypes.c_int64(req_to_token.stride(0)), _pointer(rows), _pointer(indptr),
            ctypes.c_int32(len(rows)), ctypes.c_int32(page_size), ctypes.c_int32(INDEX_BLOCKS),
        )  # fmt: skip

    @staticmethod
    def _call(function: Any, *arguments: Any) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if (error := function(*arguments, stream)) != 0:
            raise RuntimeError(f"{function.__name__}: CUDA error {error}")


def load(cache: Path) -> PageKernels:
    """The fastest kernels that this machine can have; says which in the log."""
    try:
        kernels: PageKernels = CUDAKernels(_library(cache))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("OrbitFlow's CUDA kernels are not to be had (%s): Triton's are used", error)
        kernels = TritonKernels()
    logger.info("OrbitFlow moves pages with its %s kernels", kernels.name)
    return kernels


def compile_library(target: Path, architectures: tuple[str, ...]) -> None:
    """Compile ``pages.cu`` for such ``architectures`` (sm_90a). Raises ``OSError`` without nvcc,
    ``subprocess.CalledProcessError`` with what it says where it fails."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or os.path.join(home, "bin", "nvcc")
    codes = [
        f"--generate-code=arch={name.replace('sm', 'compute')},code={name}"
        for name in architectures
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    command = [nvcc, "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", *codes,
               "-o", str(temporary), str(SOURCES / "pages.cu")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    temporary.replace(target)


def architecture(major: int, minor: int) -> str:
    """What our kernels are compiled for on a device of that compute capability."""
    return f"sm_{major}{minor}{'a' if major == 9 else ''}"


def library_name(name: str) -> str:
    """Of the file in a cache, for the architecture of that name."""
    source = hashlib.sha256((SOURCES / "pages.cu").read_bytes()).hexdigest()[:16]
    return f"pages-{source}-{name}.so"


def _library(cache: Path) -> Path:
    """The compiled library for the current device; compiled now if it has to be."""
    if given := os.environ.get(PREBUILT_ENV):
        return Path(given)
    name = architecture(*torch.cuda.get_device_capability())
    library = cache / library_name(name)
    if not library.exists():
        compile_library(library, (name,))
    return library


def _load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"orbitflow_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _page_bytes(pages: torch.Tensor) -> int:
    nbytes = pages[0].numel() * pages.itemsize
    if nbytes % CUDA_ALIGNMENT:
        raise ValueError(f"pages of {nbytes} bytes: {CUDA_ALIGNMENT} are copied at once")
    return nbytes


def _as_words(pages: torch.Tensor) -> torch.Tensor:
    """``[pages, words]`` of the widest words that fit a page."""
    flat = pages.flatten(1).view(torch.uint8)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if flat.shape[1] % dtype.itemsize == 0:
            return flat.view(dtype)
    return flat
