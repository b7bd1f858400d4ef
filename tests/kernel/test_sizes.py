"""How memory becomes KV blocks: everything fits, nothing is wasted, window groups take less, too little is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_core.blocks import KVBlocks
from kernel_core.config import EngineConfig
from kernel_core.errors import CapacityError
from kernel_core.plan import Capabilities, KVGroup, WorkerReport
from kernel_core.sizes import capacity, settle, show, summary

FULL = KVGroup("full", 16, 100, ("a",))
WINDOW = KVGroup("window", 16, 300, ("b",), window=64)


def report(groups=(FULL,), budget=100_000, model_len=1000, draft_width=0) -> WorkerReport:
    return WorkerReport(groups, budget, Capabilities(), 10, model_len, draft_width, memory={"weights": 5 << 20, "kv": budget})


def used(groups, allocation) -> int:
    return sum(group.bytes_per_block * blocks for group, blocks in zip(groups, allocation.num_blocks))


@given(
    groups=st.sampled_from([(FULL,), (WINDOW,), (FULL, WINDOW), (KVGroup("full", 0, 700, ("a",)),)]),
    budget=st.integers(2_000, 300_000),
    model_len=st.integers(16, 3000),
    slots=st.integers(1, 300),
    chunk=st.integers(1, 4000),
    draft_width=st.integers(0, 5),
    depth=st.integers(1, 2),
)
def test_one_request_of_full_length_always_fits_and_the_budget_is_kept(
    groups, budget, model_len, slots, chunk, draft_width, depth
):
    config = EngineConfig(max_requests=slots, max_tokens_per_step=chunk)
    try:
        allocation = settle(config, report(groups, budget, model_len, draft_width), depth)
    except CapacityError:
        return
    assert used(groups, allocation) <= budget and allocation.max_model_len <= model_len
    longest = allocation.max_model_len
    assert KVBlocks(groups, allocation).fits(longest, max(min(chunk, longest), 1 + draft_width))


def test_memory_is_used_up_to_the_last_block():
    allocation = settle(EngineConfig(), report(), 1)
    assert allocation.num_blocks == (1000,) and capacity(report(), allocation) == 999 * 16


def test_a_window_group_takes_what_its_windows_need_and_leaves_the_rest_to_the_other():
    config = EngineConfig(max_requests=4, max_tokens_per_step=64)
    allocation = settle(config, report((FULL, WINDOW), budget=50_000, model_len=2000), 1)
    full, window = allocation.num_blocks
    assert window == (8 + 1) + 3 * (4 + 1) + 1  # one request in a chunk, three decoding, the null block
    assert full == (50_000 - window * 300) // 100


def test_no_more_is_taken_than_all_slots_can_use():
    allocation = settle(EngineConfig(max_requests=2), report(model_len=100, budget=10**9), 1)
    assert allocation.num_blocks == (2 * 7 + 1,)


def test_kv_blocks_overrides_the_budget():
    assert settle(EngineConfig(kv_blocks=77), report(budget=1), 1).num_blocks == (77,)


def test_auto_takes_what_fits_and_a_number_that_does_not_is_refused_with_what_would():
    small = report(budget=2_000)
    allocation = settle(EngineConfig(), small, 1)
    assert allocation.max_model_len == 19 * 16
    with pytest.raises(
        CapacityError, match=r"max_model_len 305 does not fit.* to 304 or less.*engine.kv_memory.*weights 5.0 MiB"
    ):
        settle(EngineConfig(max_model_len=305), small, 1)
    with pytest.raises(CapacityError, match=r"does not fit: its KV needs .* raise engine.kv_memory"):
        settle(EngineConfig(), report(budget=10), 1)


def test_the_start_line_says_where_memory_went_and_what_it_is_good_for():
    line = summary("m", "cpu", report(), settle(EngineConfig(), report(), 1), 1.25)
    assert line == (
        "m on cpu: weights 5.0 MiB, kv 97.7 KiB; KV for 15,984 tokens (999 blocks of 16), 16.0 requests of 1,000 tokens at once,"
        " at most 256; started in 1.2 s"
    )
    assert [show(n) for n in (5, 2048, 200 << 20, 3 << 30)] == ["5 bytes", "2.0 KiB", "200 MiB", "3.0 GiB"]
