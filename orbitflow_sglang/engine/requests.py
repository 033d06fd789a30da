"""Hooks on requests that come in: those that cannot be honoured are refused, others tell when.

The HTTP endpoints check what they have parsed before they answer, so that a stream is
refused with a status of 400, too. All ways into the server, ``sgl.Engine.generate`` among
them, go through ``GenerateReqInput.normalize_batch_and_arguments``, which raises.
"""

from __future__ import annotations

from typing import Any

from orbitflow_sglang.slo import SLO, SLOError, request_slo


def custom_params_of(sampling_params: object) -> object:
    """``custom_params`` of one item's sampling parameters, as the request gave them."""
    return sampling_params.get("custom_params") if isinstance(sampling_params, dict) else None


def check_sampling_params(sampling_params: object) -> None:
    """Raises ``SLOError`` for the first item of a batch, or the one request, that is wrong."""
    if not isinstance(sampling_params, list):
        request_slo(custom_params_of(sampling_params), SLO())
        return
    for index, item in enumerate(sampling_params):
        try:
            request_slo(custom_params_of(item), SLO())
        except SLOError as error:
            raise SLOError(f"sampling_params[{index}]: {error}") from None


def generate_contract_error(found: str | None, body: object) -> str | None:
    """After ``api_contract.generate_contract_error``: ``/generate``, streaming or not."""
    if found is not None or not isinstance(body, dict):
        return found
    try:
        check_sampling_params(body.get("sampling_params"))
    except SLOError as error:
        return str(error)
    return None


def validate_openai_request(found: str | None, serving: Any, request: Any) -> str | None:
    """After ``_validate_request`` of chat and text completions."""
    if found is not None:
        return found
    try:
        request_slo(request.custom_params, SLO())
    except SLOError as error:
        return str(error)
    return None


def state_with_arrival(state: dict[str, Any], stats: Any) -> dict[str, Any]:
    """After ``__getstate__`` of a request's times on their way to the scheduler: when it came in.

    TTFT counts from there. The scheduler sees a request behind the step under way, which may be a
    long chunk of a prompt, and SGLang does not tell it.
    """
    return {**state, "created_time": stats.created_time}


def normalize_batch_and_arguments(request: Any) -> None:
    """Before ``GenerateReqInput.normalize_batch_and_arguments``."""
    check_sampling_params(request.sampling_params)
