"""Mixes, arrival processes and trace files."""

from __future__ import annotations

import io
import random
import statistics
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.workload import arrivals, mixes, trace_file
from eval.workload.requests import TraceRequest
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit
HEAD = "arrival_s,input_tokens,output_tokens"


@pytest.mark.parametrize(
    ("name", "cv"),
    [("poisson", 1.0), ("lognormal:2", 2.0), ("periodic", 0.0), ("uniform", 0.577),
     ("bursty", 3.87), ("bimodal", None)],
)  # fmt: skip
def test_arrivals_have_mean_1_and_the_spread_of_their_kind(name: str, cv: float | None) -> None:
    gaps = list(islice(arrivals.find(name).gaps(random.Random(1)), 60_000))
    assert statistics.mean(gaps) == pytest.approx(1.0, rel=0.05)
    if cv is not None:
        assert statistics.pstdev(gaps) == pytest.approx(cv, rel=0.1, abs=1e-9)


@pytest.mark.parametrize("name", ["", "poisson:2", "lognormal:-1", "lognormal:x", "weekly"])
def test_unknown_arrivals_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lognormal"):
        arrivals.find(name)


def test_a_mix_draws_its_types_in_their_shares() -> None:
    trace = mixes.draw(mixes.find("SS:1+LL:3"), 4000, "poisson", seed=1)
    long = [one for one in trace if one.input_tokens > 1000]
    assert len(long) / len(trace) == pytest.approx(0.75, abs=0.02)
    assert all(one.output_tokens > 800 for one in long)
    assert all(one.output_tokens < 620 for one in trace if one not in long)
    mix = mixes.find("SS:1+LL:3")
    assert statistics.mean(one.input_tokens for one in trace) == pytest.approx(
        mix.mean_input, rel=0.05
    )
    assert statistics.mean(one.output_tokens for one in trace) == pytest.approx(
        mix.mean_output, rel=0.05
    )


def test_scaled_and_full_mixes() -> None:
    assert mixes.find("LL*4").mean_input == 4 * 6144
    assert mixes.find("LL:full").mean_output == 6144
    assert mixes.find("MIX").shares == (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("name", ["", "XX", "SS:-1", "SS:0", "MIX*0", "MIX*x", "SS+"])
def test_unknown_mixes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown mix"):
        mixes.find(name)


def test_equal_seeds_draw_equal_traces() -> None:
    one = mixes.draw(mixes.find("MIX"), 50, "bursty", seed=3)
    assert one == mixes.draw(mixes.find("MIX"), 50, "bursty", seed=3)
    assert one != mixes.draw(mixes.find("MIX"), 50, "bursty", seed=4)


REQUESTS = st.builds(
    TraceRequest,
    arrival_s=st.integers(0, 10**9).map(lambda micro: micro / 1e6),
    input_tokens=st.integers(10, 10**6),
    output_tokens=st.integers(1, 10**6),
    rid=st.just("r"),
    slo=st.builds(SLO, st.sampled_from((None, 0.5)), st.sampled_from((None, 0.05))),
    prefix_id=st.just("p"),
    prefix_tokens=st.integers(1, 10),
)


@given(st.lists(REQUESTS, min_size=1, max_size=5))
def test_what_is_written_is_read_back(trace: list[TraceRequest]) -> None:
    file = io.StringIO()
    trace_file.write(trace, file)
    again = trace_file.read(file.getvalue().splitlines(), "here")
    wanted = sorted(trace, key=lambda one: one.arrival_s)
    fields = ("arrival_s", "input_tokens", "output_tokens", "slo", "prefix_id", "prefix_tokens")
    for one, other in zip(wanted, again, strict=True):
        for field in fields:
            assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,input_tokens\n0,1", "line 1: lacks output_tokens"),
        (HEAD + ",colour\n0,1,1,red", "line 1: has unknown colour"),
        (HEAD + "\n0,1,1\n1,x,1", "line 3: input_tokens must be a number"),
        (HEAD + "\n0,1.5,1", "line 2: input_tokens must be whole"),
        (HEAD + "\n-1,1,1", "line 2: arrival_s must be a number of at least 0"),
        (HEAD + "\nnan,1,1", "line 2: arrival_s"),
        (HEAD + "\n0,1", "line 2: does not have as many fields"),
        (HEAD + "\n0,1,1,1", "line 2: does not have as many fields"),
        (HEAD + ",tpot_slo_ms\n0,1,1,0", "line 2: tpot_slo_ms must be above 0"),
        (HEAD + ",prefix_id,prefix_tokens\n0,5,1,a,6", "line 2: prefix_id and prefix_tokens"),
        (HEAD, "no requests"),
        ("", "line 1: lacks"),
    ],
)
def test_a_broken_file_is_refused_with_line_and_reason(text: str, message: str) -> None:
    with pytest.raises(trace_file.BadTrace, match=f"here.*{message}"):
        trace_file.read(text.splitlines(), "here")


def test_traces_of_the_project_are_found_by_name_and_others_are_not() -> None:
    trace = trace_file.load("mooncake_fast25_conversation")
    assert len(trace) == 12_031
    kept, dropped = trace_file.fitting(trace, 8192)
    assert 0 < len(kept) == 12_031 - dropped
    with pytest.raises(trace_file.BadTrace, match="no such file, and none of the traces azure"):
        trace_file.load("nowhere.csv")
