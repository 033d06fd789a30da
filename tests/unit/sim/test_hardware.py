"""Profiles: data that is complete, and formulas against numbers by hand."""

from __future__ import annotations

import pytest

from eval.sim import hardware
from eval.sim.hardware import Chunk, find, names, parse

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", names())
def test_every_profile_is_a_machine_that_the_controller_can_plan_for(name: str) -> None:
    machine = find(name)
    assert machine.source and machine.about
    assert machine.arena_pages % machine.layers == 0
    context = machine.arena_tokens // 2
    fitted, real = machine.profile.compute.step_s(4, context), machine.step_s(4, context)
    assert fitted == pytest.approx(real, rel=0.01)


def test_what_is_linear_is_fitted_as_it_is() -> None:
    linear = hardware._table()["a5000-8b-published"]["linear"]
    found = find("a5000-8b-published").profile.compute
    assert found.constant_s * 32 == pytest.approx(linear["constant_s"], rel=1e-9)
    assert found.per_token_s * 32 == pytest.approx(linear["per_token_s"], rel=1e-9)
    assert (found.per_request_s, found.r2) == (0, 1)


def test_a_decode_step_on_an_a5000() -> None:
    machine = find("a5000-8b")
    # 16 GB of weights and 10,000 tokens of 131,072 bytes at 653 GB/s, and half a millisecond.
    assert machine.step_s(4, 10_000) == pytest.approx((16 + 1.31072) / 653 + 0.0005)
    # 100 pages of 16 tokens of a layer: 6.55 MB more.
    moved = 100 * 16 * 4096 / 653e9
    assert machine.step_s(4, 10_000, (), 100) - machine.step_s(4, 10_000) == pytest.approx(moved)


def test_a_long_chunk_is_bound_by_arithmetic() -> None:
    machine = find("a5000-8b")
    # 2,048 tokens of 16 GFLOP at 63 TFLOPS; each attends to half of them, on average.
    pairs = 2048 * 2049 / 2
    wanted = 2048 * 16e9 / 63e12 + pairs * 524e3 / 63e12 + 0.0005
    assert machine.step_s(0, 0, (Chunk(2048, 0),)) == pytest.approx(wanted)
    assert machine.prefill_s(4096) > 2 * wanted  # the second half has the first as context


def test_the_link_slows_a_linear_machine_down_as_far_as_it_is_busy() -> None:
    values = hardware._table()["a5000-8b-published"]
    slow = values["linear"] | {"copy_slowdown": 0.2, "tiered_s": 0.001}
    machine = parse("slow", values | {"linear": slow})
    bare = machine.step_s(1, 1000)
    assert machine.step_s(1, 1000, (), 10**6) == pytest.approx(bare * 1.2 + 0.001)
    half = int(bare / 2 / machine.h2d_page_s)
    assert machine.step_s(1, 1000, (), half) == pytest.approx(bare * 1.1 + 0.001, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"speed": 1}, "no such key: speed"), ({"roofline": {}}, "exactly one of roofline, linear")],
)
def test_a_bad_profile_is_refused_by_name(change: dict[str, object], text: str) -> None:
    values = dict(hardware._table()["a5000-8b-published"]) | change
    with pytest.raises(ValueError, match=text):
        parse("bad", values)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="a5000-8b, a5000-8b-published"):
        find("a100")
