"""What a step and a transfer cost, fitted to samples, and the profile that keeps it.

    compute of a decode step   layers * (constant + per_request * batch + per_token * context)
    transfer of pages          setup + per_page * pages          each direction its own

Both are fitted with a robust loss, so that a few disturbed samples do not count; R^2 of all
samples is kept beside the coefficients. A profile is a JSON file for one model on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import orjson
from scipy.optimize import nnls

from orbitflow_sglang.planner.problem import FloatArray

PROFILE_VERSION = 1
ROBUST_ROUNDS = 500
HUBER = 1.345  # in standard deviations: 95 % as efficient as least squares on clean samples
NOTHING = 1e-12  # of the largest output: a coefficient that only rounding has put there
DIGITS = 10


@dataclass(frozen=True)
class DecodeSample:
    """One measured decode step with everything resident."""

    batch: int
    context_tokens: int  # of all requests
    step_s: float


@dataclass(frozen=True)
class TransferSample:
    """One measured transfer."""

    pages: int  # of one layer
    seconds: float


@dataclass(frozen=True)
class ComputeModel:
    """Seconds per layer of a decode step, linear in batch and context."""

    layers: int
    constant_s: float
    per_request_s: float
    per_token_s: float
    r2: float

    def layer_s(self, batch: int, context_tokens: int) -> float:
        """Compute time of one layer, seconds."""
        return self.constant_s + self.per_request_s * batch + self.per_token_s * context_tokens

    def step_s(self, batch: int, context_tokens: int) -> float:
        """Compute time of a step, seconds."""
        return self.layers * self.layer_s(batch, context_tokens)


@dataclass(frozen=True)
class TransferModel:
    """Seconds of a transfer of pages of one layer, linear with a constant."""

    setup_s: float
    per_page_s: float
    r2: float

    def seconds(self, pages: int) -> float:
        """Time on the link of one transfer, seconds; none for no pages."""
        return self.setup_s + self.per_page_s * pages if pages else 0.0


@dataclass(frozen=True)
class Profile:
    """The costs of one model on one device."""

    model: str
    device: str
    page_bytes: int  # K and V of one page in one layer
    compute: ComputeModel
    h2d: TransferModel
    d2h: TransferModel
    prefill_tokens_per_s: float | None = None

    def dump(self) -> bytes:
        """As JSON, for a file."""
        return orjson.dumps({"version": PROFILE_VERSION} | asdict(self), option=orjson.OPT_INDENT_2)

    @staticmethod
    def load(text: bytes) -> Profile:
        """Reads ``dump``. Raises ``ValueError`` that names the key."""
        try:
            values = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(values, dict) or values.pop("version", None) != PROFILE_VERSION:
            raise ValueError(f"version: must be {PROFILE_VERSION}")
        for key, kind in (
            ("compute", ComputeModel),
            ("h2d", TransferModel),
            ("d2h", TransferModel),
        ):
            values[key] = _checked(kind, f"{key}.", values.get(key))
        return _checked(Profile, "", values)


def fit_compute(samples: Sequence[DecodeSample], layers: int) -> ComputeModel:
    """The compute model of these samples. Raises ``ValueError`` with fewer than three."""
    if len(samples) < 3:
        raise ValueError(f"three decode samples are needed, got {len(samples)}")
    inputs = np.array([(1.0, s.batch, s.context_tokens) for s in samples])
    seconds = np.array([s.step_s for s in samples]) / layers
    (constant, per_request, per_token), r2 = _fit(inputs, seconds)
    return ComputeModel(layers, constant, per_request, per_token, r2)


def fit_transfer(samples: Sequence[TransferSample]) -> TransferModel:
    """The transfer model of these samples. Raises ``ValueError`` with fewer than two."""
    if len(samples) < 2:
        raise ValueError(f"two transfer samples are needed, got {len(samples)}")
    inputs = np.array([(1.0, s.pages) for s in samples])
    (setup, per_page), r2 = _fit(inputs, np.array([s.seconds for s in samples]))
    return TransferModel(setup, per_page, r2)


def _fit(inputs: FloatArray, outputs: FloatArray) -> tuple[tuple[float, ...], float]:
    """Coefficients, none negative, by least squares reweighted for Huber's loss, and R^2.

    Columns are scaled to a like size: a token costs a millionth of the constant. Iterated until
    rounding is all that changes, and then rounded to ``DIGITS``, so that the same samples have the
    same fit on every processor: a plan may hang on the last digit.
    """
    scale = np.abs(inputs).max(axis=0)
    scale[scale == 0] = 1.0
    unit = float(np.abs(outputs).max()) or 1.0
    a, b = inputs / scale, outputs / unit
    weight = np.ones(len(b))
    solution = np.zeros(a.shape[1])
    for _ in range(ROBUST_ROUNDS):
        root = np.sqrt(weight)
        found, _norm = nnls(a * root[:, None], b * root)
        if np.allclose(found, solution, rtol=1e-13, atol=1e-16):
            break
        solution = found
        residual = np.abs(b - a @ solution)
        spread = 1.4826 * float(np.median(residual))  # of normal residuals: one deviation
        if spread <= 1e-12:
            weight = (residual <= 1e-9).astype(float) + 1e-9
        else:
            weight = np.minimum(1.0, HUBER * spread / np.maximum(residual, 1e-300))
    solution[solution < NOTHING] = 0.0
    residual = b - a @ solution
    total = float(((b - b.mean()) ** 2).sum())
    r2 = 1 - float((residual**2).sum()) / total if total > 0 else 1.0
    return tuple(map(_rounded, solution / scale * unit)), _rounded(r2)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


Kind = TypeVar("Kind")


def _checked(kind: type[Kind], where: str, values: object) -> Kind:
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.')}: must be an object")
    wanted = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in wanted:
            raise ValueError(f"{where}{key}: no such key; there are {', '.join(wanted)}")
    found: dict[str, Any] = {}
    for key, field in wanted.items():
        if key not in values and field.default is None:
            continue
        if key not in values:
            raise ValueError(f"{where}{key}: is missing")
        value = values[key]
        text = str(field.type)
        if text == "str":
            good = isinstance(value, str)
        elif text in ("int", "float", "float | None"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good = value is None and text.endswith("None")
            good = good or (number and math.isfinite(value) and (value >= 0 or key == "r2"))
            good = good and (text != "int" or isinstance(value, int))
        else:
            good = True  # checked already
        if not good:
            raise ValueError(f"{where}{key}: must be {text} and not negative, got {value!r}")
        found[key] = value
    return kind(**found)
