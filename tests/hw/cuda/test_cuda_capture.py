"""What recording a graph leaves behind: the stream, the pool. torch's part is played, as these are its rules on a GPU."""

from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from kernel_cuda.capture import Capture


@pytest.fixture
def cuda(monkeypatch):
    """`capturing` raises from within its end when `fails`, and then leaves the thread on the stream that was captured."""
    numbers, state = count(), SimpleNamespace(stream="default", fails=False, pools=[], streams=0, waited=[])

    def made(device):
        state.streams += 1
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def capturing(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        state.pools.append(pool)
        state.stream = stream
        try:
            yield
        finally:
            if state.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            state.stream = "default"

    default = SimpleNamespace(wait_stream=state.waited.append)
    played = {
        "Stream": made, "current_stream": lambda device: default, "stream": lambda stream: nullcontext(), "graph": capturing,
        "CUDAGraph": type("CUDAGraph", (), {"replay": lambda self: None}), "graph_pool_handle": lambda: next(numbers),
        "set_stream": lambda stream: setattr(state, "stream", "default" if stream is default else "other"),
    }  # fmt: skip
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(cuda):
    record = Capture(torch.device("cuda", 0))
    graphs = [record(lambda: 1) for _ in range(3)]
    assert len(set(cuda.pools)) == 1 and cuda.streams == 2
    graphs.clear()
    record(lambda: 1)
    assert len(set(cuda.pools)) == 2


@pytest.mark.parametrize("run", [0, 1], ids=["warming up", "capturing"])
def test_without_memory_the_error_says_so_and_what_runs_already_is_waited_for(cuda, run):
    record, runs = Capture(torch.device("cuda", 0)), count()
    cuda.fails = True

    def function():
        if next(runs) == run:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        record(function)
    assert cuda.stream == "default" and len(cuda.waited) == 1


def test_after_a_capture_that_failed_steps_run_where_they_ran_before(cuda):
    record = Capture(torch.device("cuda", 0))
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        record(lambda: 1)
    assert cuda.stream == "default"
    cuda.fails = False
    assert record(lambda: 7)[1] == 7 and len(set(cuda.pools)) == 2
