"""What the scheduler promises, one sentence a test. The device is the null device: tokens are a function of (key, position)."""

import numpy as np
import pytest

from kernel_core.config import EngineConfig
from kernel_core.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from kernel_core.plan import (
    PROMPT_LOGPROBS,
    Allocation,
    Capabilities,
    Job,
    KVGroup,
    Logprobs,
    SamplingRow,
    Span,
    StepResult,
)
from kernel_core.request import ABORT, ERROR, FINISH_REASONS, LENGTH, STOP, Request
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor, NullScript, null_tokens

FULL, WINDOW = KVGroup("full", 4, 1, ("f",)), KVGroup("window", 4, 1, ("w",), window=6)


def request(name, prompt=5, new=4, **rest):
    tokens = np.arange(prompt, dtype=np.int32)
    return Request(name, tokens, SamplingRow(), rest.pop("key", 0), prompt + new, **rest)


def expected(prompt, new, key=0):
    return null_tokens(key, np.arange(prompt, prompt + new), 100).tolist()


class Engine:
    """Scheduler and null device, driven by hand."""

    def __init__(
        self,
        groups=(FULL,),
        blocks=40,
        slots=4,
        budget=100,
        width=0,
        depth=1,
        length=48,
        script=None,
        device=None,
        ahead=0,
        lookback=0,
        **rest,
    ):
        keys = ("max_prompt_chunk", "policy_passes")
        config = EngineConfig(max_tokens_per_step=budget, **{k: rest.pop(k) for k in keys if k in rest})
        allocation = Allocation((blocks,) * len(groups), slots, length, budget, width, ahead, lookback)
        self.executor = NullExecutor(groups, 100, length, width, device, script, check_kv=True)
        self.executor.allocate(allocation)
        self.device = device or Capabilities()
        self.scheduler = Scheduler(config, groups, allocation, self.device, depth=depth, **rest)
        self.tokens, self.finish, self.errors, self.stop, self.cached = {}, {}, {}, {}, {}
        self.plans = []

    def add(self, *requests):
        for one in requests:
            self.scheduler.add(one)

    def plan(self):
        self.plans.append(self.scheduler.plan())
        return self.plans[-1]

    def commit(self, plan, result=None):
        return self.take(self.scheduler.commit(plan, result or self.executor.submit(plan).result()))

    def take(self, updates):
        for i, name in enumerate(updates.requests):
            self.tokens.setdefault(name, []).extend(updates.tokens[updates.offsets[i] : updates.offsets[i + 1]].tolist())
            if updates.finish[i]:
                assert name not in self.finish
                self.finish[name], self.stop[name] = FINISH_REASONS[updates.finish[i]], int(updates.stop_token[i])
        self.errors.update(updates.errors)
        self.cached.update(updates.cached)
        self.scheduler.check()
        return updates

    def step(self):
        plan = self.plan()
        self.commit(plan)
        return plan

    def run(self, limit=500):
        for _ in range(limit):
            if not self.scheduler.plannable():
                break
            self.step()
        self.take(self.scheduler.updates())
        return self


def rows(plan):
    return list(zip(plan.rows.tolist(), plan.start.tolist(), plan.q.tolist(), plan.room.tolist()))


# ---- the invariant and its budget -------------------------------------------------------------------------------------


def test_decodes_first_then_chunks_then_admissions():
    e = Engine(budget=10)
    e.add(request("a", 4), request("b", 13), request("c", 3))
    assert rows(e.step()) == [(0, 0, 4, 1), (1, 0, 6, 0)]
    assert rows(e.step()) == [(0, 4, 1, 1), (1, 6, 7, 1), (2, 0, 2, 0)]
    assert rows(e.step()) == [(0, 5, 1, 1), (1, 13, 1, 1), (2, 2, 1, 1)]


def test_a_prompt_takes_at_most_max_prompt_chunk_of_a_step():
    e = Engine(max_prompt_chunk=3)
    e.add(request("a", 7), request("b", 2))
    assert rows(e.step()) == [(0, 0, 3, 0), (1, 0, 2, 1)]


def test_rows_take_turns_when_the_budget_is_smaller_than_they_are_many():
    e = Engine(budget=3, width=1)
    e.add(*(request(name, 1, 9) for name in "abc"))
    assert [e.step().rows.tolist() for _ in range(7)] == [[0, 1, 2], [0], [1], [2], [0], [1], [2]]
    e.run()
    assert all(e.tokens[name] == expected(1, 9) for name in "abc")


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("budget", "blocks"), [(100, 60), (7, 60), (7, 18), (100, 18)])
def test_tokens_do_not_depend_on_batch_chunking_preemption_or_depth(depth, budget, blocks):
    e = Engine((FULL, WINDOW), blocks, 6, budget, width=2, depth=depth, script=NullScript(lambda key, p: (key + p) % 3))
    e.add(*(request(f"r{i}", 3 + 2 * i, 14 - i, key=i) for i in range(9)))
    flying = []
    while e.scheduler.plannable() or flying:
        if len(flying) < depth and e.scheduler.plannable():
            flying.append(e.plan())
        else:
            e.commit(flying.pop(0))
    for i in range(9):
        assert e.tokens[f"r{i}"] == expected(3 + 2 * i, 14 - i, key=i)
    assert (e.scheduler.preemptions > 0) == (blocks == 18 and budget == 100)
    assert e.scheduler.free_blocks == (blocks - 1,) * 2


# ---- ends -------------------------------------------------------------------------------------------------------------


def test_a_request_ends_at_its_length_or_at_its_own_stop_id():
    tokens = expected(5, 8)
    e = Engine()
    e.add(request("length", new=8), request("stop", new=8, stop_ids=frozenset({tokens[3], 10**6})))
    e.run()
    assert (e.tokens["length"], e.finish["length"], e.stop["length"]) == (tokens, "length", -1)
    assert (e.tokens["stop"], e.finish["stop"], e.stop["stop"]) == (tokens[:4], "stop", tokens[3])
    assert sorted(e.scheduler.finished) == [("length", LENGTH, 5, 8), ("stop", STOP, 5, 4)]


def test_tokens_after_a_stop_id_in_the_same_row_do_not_count():
    tokens = expected(5, 8)
    e = Engine(width=3, script=NullScript(lambda key, p: 3))
    e.add(request("stop", new=8, stop_ids=frozenset({tokens[2]})), request("other", new=8))
    e.run()
    assert e.tokens == {"stop": tokens[:3], "other": tokens}


def test_a_row_has_room_for_the_drafts_that_were_reported_last_and_never_beyond_the_length():
    e = Engine(width=3, depth=2)
    e.add(request("a", 5, 7))
    plans = [e.plan(), e.plan()]
    assert [rows(p) for p in plans] == [[(0, 0, 5, 1)], [(0, 5, 1, 1)]]  # nothing is reported yet
    e.commit(plans[0])
    plans.append(e.plan())
    assert rows(plans[-1]) == [(0, 6, 4, 4)]
    e.commit(plans[1])
    plans.append(e.plan())
    assert rows(plans[-1]) == [(0, 10, 1, 1)]  # 11 of 12 tokens may be known then
    e.commit(plans[2])  # no draft was accepted
    plans.append(e.plan())
    assert rows(plans[-1]) == [(0, 8, 3, 3)]


def test_a_row_whose_drafter_proposes_nothing_costs_one_token():
    e = Engine(width=3, script=NullScript(accept=lambda key, p: 3, drafts=lambda key, known: {1: 0, 2: 2}[key]))
    e.add(request("none", 5, 9, key=1), request("two", 5, 9, key=2))
    assert rows(e.step()) == [(0, 0, 5, 1), (1, 0, 5, 1)]
    assert rows(e.step()) == [(0, 5, 1, 1), (1, 5, 3, 3)]
    assert rows(e.step()) == [(0, 6, 1, 1), (1, 8, 3, 3)]
    e.run()
    assert e.tokens == {"none": expected(5, 9, 1), "two": expected(5, 9, 2)}


def test_blocks_reach_as_far_ahead_as_the_drafter_writes():
    e = Engine(ahead=5, length=16)
    e.add(request("a", 3, 13))
    assert e.step().new_blocks[0].columns.tolist() == [0, 1]  # 3 positions and 5 more
    assert e.step().new_blocks[0].columns.tolist() == [2]
    e.run()
    assert max(c for p in e.plans for c in p.new_blocks[0].columns) == 4  # 15 positions and 5 more
    with pytest.raises(CapacityError):
        Engine(ahead=5, length=16, blocks=5)


def test_what_the_drafter_looks_back_at_is_computed_again_and_not_written():
    e = Engine(lookback=3)
    e.add(request("a", 9, 4, family="f", key=1), request("b", 9, 4, family="f", key=2))
    e.step()
    plan = e.step()
    assert rows(plan) == [(0, 9, 1, 1), (1, 6, 3, 1)] and plan.write_from.tolist() == [0, 9]
    e.run()
    assert e.cached == {"a": 0, "b": 6} and e.tokens == {"a": expected(9, 4, 1), "b": expected(9, 4, 2)}


def test_abort_at_any_time_gives_one_finish_code():
    e = Engine(slots=1, depth=2)
    e.add(request("running"), request("waiting"), request("gated", gates=("g",)))
    plan = e.plan()
    e.scheduler.abort(["running", "waiting", "gated", "nobody"])
    updates = e.commit(plan)
    assert updates.requests == ("running", "waiting", "gated") and set(updates.finish) == {ABORT}
    assert updates.tokens.size == 0 and e.scheduler.unfinished == 0 and e.scheduler.free_blocks == (39,)
    e.scheduler.abort(["running"])
    assert not e.scheduler.has_work()


def test_an_idle_scheduler_hands_out_its_news():
    e = Engine()
    e.add(request("gated", gates=("g",)))
    assert not e.scheduler.has_work()
    e.scheduler.abort(["gated"])
    assert e.scheduler.has_work() and not e.scheduler.plannable()
    assert e.scheduler.updates().requests == ("gated",) and not e.scheduler.has_work()
    assert e.scheduler.updates().requests == ()


def test_a_failed_row_ends_only_its_request():
    e = Engine(script=NullScript(fail={"bad": 7}))
    e.add(request("good", new=8), request("bad", new=8))
    e.run()
    assert e.tokens["good"] == expected(5, 8) and e.finish == {"good": "length", "bad": "error"}
    assert e.tokens["bad"] == expected(5, 2) and e.errors == {"bad": "logits are not finite"}


@pytest.mark.parametrize("depth", [1, 2])
def test_lost_kv_is_recomputed(depth):
    e = Engine(depth=depth, script=NullScript(lose={"a": 8}))
    e.add(request("a", new=9), request("b", new=9))
    flying = []
    while e.scheduler.plannable() or flying:
        if len(flying) < depth and e.scheduler.plannable():
            flying.append(e.plan())
        else:
            e.commit(flying.pop(0))
    assert e.tokens == {"a": expected(5, 9), "b": expected(5, 9)}
    assert [o.token_ids.size for p in e.plans for o in p.opened] == [5, 5, 8]


def test_a_dead_worker_ends_everybody():
    e = Engine(depth=2, slots=1)
    e.add(request("a"), request("b"), request("c", gates=("g",)))
    e.plan()
    updates = e.take(e.scheduler.fail_all("rank 0 died"))
    assert set(updates.requests) == {"a", "b", "c"} and set(updates.finish) == {ERROR}
    assert set(updates.errors.values()) == {"rank 0 died"} and e.scheduler.free_blocks == (39,)
    assert not e.scheduler.has_work()


def test_a_result_of_another_step_or_shape_is_refused():
    e = Engine(depth=2)
    e.add(request("a"))
    first, second = e.plan(), e.plan()
    with pytest.raises(EngineDeadError, match="oldest in flight"):
        e.commit(second, e.executor.submit(first).result())
    e = Engine()
    e.add(request("a"))
    plan, z = e.plan(), np.zeros(1, np.int32)
    with pytest.raises(EngineDeadError, match="more tokens"):
        e.commit(plan, StepResult(plan.plan_id, np.zeros(2, np.int32), np.array([0, 2], np.int32), z, z, z, z))
    with pytest.raises(EngineDeadError, match="in flight already"):
        Engine(depth=0).plan()


# ---- slots and blocks -------------------------------------------------------------------------------------------------


def test_a_slot_is_reused_after_the_plan_that_closed_it():
    e = Engine(slots=1)
    e.add(request("a", new=1), request("b", new=1))
    first, second, third = e.step(), e.step(), e.step()
    assert [o.request_id for o in first.opened] == ["a"] and second.closed.tolist() == [0] and not second.opened
    assert [o.request_id for o in third.opened] == ["b"] and third.opened[0].slot == 0


def test_blocks_of_an_ended_request_wait_for_the_plans_that_name_them():
    e = Engine(blocks=40, depth=2)
    e.add(request("a", 9))
    first, second = e.plan(), e.plan()
    e.scheduler.abort(["a"])
    assert e.scheduler.free_blocks == (36,)
    e.commit(first)
    assert e.scheduler.free_blocks == (36,)
    e.commit(second)
    assert e.scheduler.free_blocks == (39,)


def test_running_out_of_blocks_preempts_the_latest_and_changes_no_token():
    e = Engine(blocks=13)
    e.add(request("a", 16, 16, key=1), request("b", 16, 16, key=2))
    e.run()
    assert e.scheduler.preemptions > 0
    again = [o for p in e.plans for o in p.opened][2]
    assert again.request_id == "b" and again.token_ids.tolist() == [*range(16), *expected(16, again.token_ids.size - 16, 2)]
    assert e.tokens == {"a": expected(16, 16, 1), "b": expected(16, 16, 2)}


def test_a_preempted_request_keeps_tokens_of_plans_in_flight_and_waits_for_them():
    e = Engine(depth=2)
    e.add(request("a", 5, 4))
    first, second = e.plan(), e.plan()
    entry = e.scheduler.slots.entries[0]
    e.scheduler.preempt(entry)
    e.commit(first)
    third = e.plan()
    assert third.closed.tolist() == [0] and not third.opened
    e.commit(second)
    e.commit(third)
    assert e.tokens["a"] == expected(5, 2)
    assert e.plan().opened[0].token_ids.size == 7


def test_a_preempted_request_may_end_with_tokens_in_flight():
    e = Engine(depth=2)
    e.add(request("a", 5, 2), request("b", 5, 9, stop_ids=frozenset(expected(5, 2)[1:])))
    first, second = e.plan(), e.plan()
    for slot in (0, 1):
        e.scheduler.preempt(e.scheduler.slots.entries[slot])
    e.commit(first)
    e.commit(second)
    assert e.finish == {"a": "length", "b": "stop"} and e.tokens["a"] == e.tokens["b"] == expected(5, 2)
    assert not e.scheduler.plannable()


def test_admission_leaves_running_prompts_the_blocks_they_need():
    e = Engine(blocks=13, budget=8, slots=4)
    e.add(request("long", 40, 4), request("other", 8, 4))
    e.step()
    assert e.scheduler.running == 1  # "long" has 2 of its 11 blocks; the other 10 are not given away
    e.run()
    assert e.scheduler.preemptions == 0 and e.finish == {"long": "length", "other": "length"}


def test_a_request_alone_with_too_few_blocks_fails_with_a_sentence():
    e = Engine(blocks=13)
    e.add(request("pinned", 20, 1))
    plan = e.plan()
    e.executor.submit(plan).result()
    result = StepResult(plan.plan_id, *(np.array(v, np.int32) for v in ([1], [0, 1], [20], [0], [0], [0])))
    handle = e.scheduler.kv.hold(0, 20, owner="connector")
    e.commit(plan, result)
    e.add(request("a", 31, 16))
    e.run()
    assert e.finish["a"] == "error" and "does not fit into the KV cache" in e.errors["a"]
    e.add(request("b", 20, 16))
    e.run()
    assert e.finish["b"] == "error" and "raise kv_memory" in e.errors["b"] and len(e.tokens["b"]) == 9
    e.scheduler.kv.drop(handle, 0)
    e.add(request("c", 20, 16))
    assert e.run().finish["c"] == "length"


def test_window_groups_need_blocks_for_the_window_only():
    e = Engine((WINDOW,), blocks=6, budget=4, slots=1)
    e.add(request("a", 30, 17))
    e.run()
    assert e.tokens["a"] == expected(30, 17) and e.scheduler.preemptions == 0


def test_a_model_without_kv_runs():
    e = Engine(())
    e.add(request("a"))
    assert e.run().tokens["a"] == expected(5, 4)


# ---- what cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("twice"), "running already"),
        (request("x", 0), "prompt is empty"),
        (request("x", 5, 0), "leaves no room"),
        (request("x", 40, 20), "max_model_len is 48"),
        (request("x", spans=(Span(0, 1, b"", 1),)), "spans"),
        (request("x", resources={"adapters": 1}), "adapters"),
    ],
)
def test_add_refuses_what_can_never_run(bad, message):
    e = Engine()
    e.add(request("twice"))
    with pytest.raises(RequestError, match=message):
        e.add(bad)
    assert e.scheduler.unfinished == 1


def test_one_maximal_request_must_fit():
    with pytest.raises(CapacityError, match="lower max_model_len"):
        Engine(blocks=12)
    Engine(blocks=13)


# ---- admission --------------------------------------------------------------------------------------------------------


class Places:
    name = "places"

    def __init__(self, size):
        self.size, self.held = size, {}

    def reserve(self, request_id, want):
        if sum(self.held.values()) + want > self.size:
            return False
        self.held[request_id] = want
        return True

    def release(self, request_id):
        self.held.pop(request_id, None)


class Never(Places):
    name = "never"

    def reserve(self, request_id, want):
        return False


def opened(e):
    return [o.request_id for p in e.plans for o in p.opened]


def test_a_refused_request_does_not_block_those_behind_it():
    places = Places(1)
    e = Engine(resources=[places])
    e.add(*(request(n, new=3, resources={"places": 1}) for n in "ab"), request("c", new=3))
    e.step()
    assert opened(e) == ["a", "c"] and places.held == {"a": 1}
    e.run()
    assert opened(e) == ["a", "c", "b"] and places.held == {}


def test_all_resources_grant_or_none_is_kept():
    places = Places(1)
    e = Engine(resources=[places, Never(0)])
    e.add(request("a", resources={"places": 1, "never": 1}), request("b", resources={"places": 1}))
    e.step()
    assert opened(e) == ["b"] and places.held == {"b": 1}


def test_after_enough_passes_a_refused_request_is_first_in_line():
    e = Engine(resources=[Places(2)], policy_passes=3, slots=2)
    e.add(request("holder", new=12, resources={"places": 1}), request("big", new=2, resources={"places": 2}))
    e.add(*(request(f"small{i}", new=2) for i in range(8)))
    e.run()
    order = opened(e)
    assert order[0] == "holder" and order.index("big") == 4, order


def test_a_gate_holds_a_request_and_an_error_fails_it():
    e = Engine()
    e.add(request("a", gates=("x", "y")), request("b", gates=("x",)), request("c"))
    e.step()
    e.scheduler.open_gate("a", "x")
    e.scheduler.open_gate("b", "x", "no such grammar")
    e.step()
    assert opened(e) == ["c"] and e.errors == {"b": "no such grammar"} and e.finish == {"b": "error"}
    e.scheduler.open_gate("a", "y")
    e.scheduler.open_gate("nobody", "y")
    e.run()
    assert opened(e) == ["c", "a"] and e.finish["a"] == "length"


def test_the_ack_of_a_job_opens_its_gate():
    e = Engine(script=NullScript(bad_jobs=frozenset({"h2"}), ack_after=1))
    jobs = {h: (Job("grammar", h, b"source"),) for h in ("h1", "h2")}
    e.add(*(request(h, jobs=jobs[h], gates=(f"grammar:{h}",)) for h in jobs), request("too", gates=("grammar:h1",)))
    plan = e.plan()
    assert [j.key for j in plan.jobs] == ["h1", "h2"] and not plan.opened
    e.commit(plan)
    assert e.scheduler.plannable()  # the acks are still to come
    e.run()
    assert e.finish == {"h1": "length", "too": "length", "h2": "error"} and e.errors == {"h2": "the job failed"}


# ---- families ---------------------------------------------------------------------------------------------------------


def test_a_copied_block_beyond_the_first_chunk_is_there_when_it_is_reached():
    e = Engine(lookback=3, max_prompt_chunk=1)
    e.add(request("a", 13, 4, family="f", key=1), request("b", 13, 4, family="f", key=2))
    e.run()
    assert e.cached == {"a": 0, "b": 10} and e.tokens == {"a": expected(13, 4, 1), "b": expected(13, 4, 2)}


def test_siblings_share_the_prompt_of_the_first_and_recompute_its_last_token():
    e = Engine(blocks=40, budget=6)
    e.add(*(request(f"c{i}", 10, 5, key=i, family="f") for i in range(3)))
    e.step()
    assert opened(e) == ["c0"]
    e.step()
    plan = e.step()
    assert [(o.request_id, o.computed) for o in plan.opened] == [("c1", 9), ("c2", 9)]
    assert rows(plan)[1:] == [(1, 9, 1, 1), (2, 9, 1, 1)] and plan.write_from.tolist()[1:] == [10, 10]
    assert plan.copies[0].src.size == 4  # two tokens of the partial block for each
    assert e.scheduler.free_blocks == (39 - 3 - 1 - 1,)
    e.run()
    assert e.tokens == {f"c{i}": expected(10, 5, i) for i in range(3)} and e.cached == {"c0": 0, "c1": 9, "c2": 9}
    assert e.scheduler.free_blocks == (39,)


def test_a_sibling_takes_over_when_the_first_ends_early():
    e = Engine(budget=6)
    e.add(*(request(f"c{i}", 10, 5, key=i, family="f") for i in range(3)))
    e.step()
    e.scheduler.abort(["c0"])
    e.run()
    assert e.tokens["c1"] == expected(10, 5, 1) and e.cached == {"c0": 0, "c1": 0, "c2": 9}


def test_other_prompts_and_prompt_logprobs_do_not_wait_for_the_family():
    e = Engine()
    e.add(request("a", 10, family="f"), request("b", 11, family="f"), request("c", 10, family="f", flags=PROMPT_LOGPROBS))
    e.add(request("d", 10, family="f", identity=b"adapter"))
    assert rows(e.step()) == [(0, 0, 10, 1), (1, 0, 11, 1), (2, 0, 10, 1), (3, 0, 10, 1)]


# ---- devices ----------------------------------------------------------------------------------------------------------


def test_lengths_are_not_mixed_where_the_device_cannot():
    e = Engine(device=Capabilities(mixed_lengths=False), budget=20)
    e.add(request("a", 6, 9), request("b", 9, 9), request("c", 6, 9))
    e.run()
    assert all(len(set(p.q.tolist())) <= 1 for p in e.plans)
    assert e.finish == dict.fromkeys("abc", "length")


def test_only_allowed_query_lengths_are_planned():
    e = Engine(device=Capabilities(query_lengths=(1, 4, 16)), width=5)
    e.add(request("a", 23, 20))
    e.run()
    assert [q for p in e.plans for q in p.q.tolist()][:4] == [16, 4, 1, 1]
    assert {q for p in e.plans for q in p.q.tolist()} == {16, 4, 1} and e.tokens["a"] == expected(23, 20)
    with pytest.raises(ConfigError, match="query length 1"):
        Engine(device=Capabilities(query_lengths=(4,)))


def test_no_more_long_rows_than_the_device_takes():
    e = Engine(device=Capabilities(max_long_rows=2), width=3)
    e.add(*(request(n, 6, 12) for n in "abcd"))
    e.run()
    assert {int((p.q > 1).sum()) for p in e.plans} == {0, 1, 2} and e.finish == dict.fromkeys("abcd", "length")


# ---- columns ----------------------------------------------------------------------------------------------------------


def logprobs(entries):
    row, position = (np.array(c, np.int32) for c in zip(*entries))
    return Logprobs(row, position, position[:, None] * 10, -position[:, None].astype(np.float32), np.ones(len(entries), np.int32))


def result_of(plan, tokens, **rest):
    counts = [len(t) for t in tokens]
    flat = np.array([t for row in tokens for t in row], np.int32)
    zero, drafts = np.zeros(plan.rows.size, np.int32), np.full(plan.rows.size, 9, np.int32)
    computed = plan.start + plan.q - plan.room + np.array(counts, np.int32)
    return StepResult(plan.plan_id, flat, np.cumsum([0, *counts], dtype=np.int32), computed, zero, zero, drafts, **rest)


def test_logprobs_follow_their_requests_and_drop_tokens_that_do_not_count():
    e = Engine(width=2)
    e.add(request("a", 5), request("b", 3, stop_ids=frozenset({7})), request("c", 3))
    plan = e.plan()
    e.commit(plan, result_of(plan, [[1], [2], [3]]))
    e.scheduler.abort(["a"])
    plan = e.plan()
    updates = e.commit(plan, result_of(plan, [[7, 8], [4]], logprobs=logprobs([(0, 4), (0, 5), (1, 4)])))
    assert updates.requests == ("a", "b", "c") or updates.requests == ("b", "c", "a")
    lp = updates.logprobs
    assert [(updates.requests[r], p) for r, p in zip(lp.row, lp.position)] == [("b", 4), ("c", 4)]
    assert lp.token_ids.tolist() == [[40], [40]] and e.tokens["b"] == [2, 7] and e.stop["b"] == 7


def test_prompt_logprobs_go_out_once_also_after_preemption_and_without_tokens():
    e = Engine(budget=4)
    e.add(request("a", 6, flags=PROMPT_LOGPROBS))
    plan = e.plan()
    assert plan.flags.tolist() == [PROMPT_LOGPROBS]
    first = e.commit(plan, result_of(plan, [[]], prompt_logprobs=logprobs([(0, p) for p in (1, 2, 3, 4)])))
    assert first.requests == ("a",) and first.finish.tolist() == [0] and first.prompt_logprobs.row.tolist() == [0] * 4
    e.scheduler.preempt(e.scheduler.slots.entries[0])
    plan = e.plan()
    if not plan.rows.size:
        e.commit(plan, result_of(plan, []))
        plan = e.plan()
    again = e.commit(plan, result_of(plan, [[]], prompt_logprobs=logprobs([(0, p) for p in (1, 2, 3, 4)])))
    assert again.prompt_logprobs.row.size == 0
    plan = e.plan()
    rest = e.commit(plan, result_of(plan, [[9]], prompt_logprobs=logprobs([(0, 5)])))
    assert rest.prompt_logprobs.position.tolist() == [5] and rest.tokens.tolist() == [9]


def test_outputs_of_void_rows_are_dropped():
    e = Engine(depth=2)
    e.add(request("a"), request("b"))
    plan, array = e.plan(), np.zeros(2)
    e.scheduler.abort(["a"])
    updates = e.commit(plan, result_of(plan, [[1], [2]], outputs=((0, "state", array), (1, "state", array))))
    assert [(name, key) for name, key, _ in updates.outputs] == [("b", "state")]


def test_plans_do_not_change_after_they_were_made():
    e = Engine(depth=3, width=1)
    e.add(*(request(n, 4, 9, key=3) for n in "abc"))
    plans, copies = [], []
    for _ in range(3):
        plans.append(e.plan())
        copies.append([a.copy() for a in (plans[-1].rows, plans[-1].start, plans[-1].q, plans[-1].room, plans[-1].closed)])
    for plan in plans:
        e.commit(plan)
    e.run()
    for plan, copy in zip(plans, copies):
        for a, b in zip((plan.rows, plan.start, plan.q, plan.room, plan.closed), copy):
            assert a.dtype == np.int32 and np.array_equal(a, b)
