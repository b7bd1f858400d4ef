"""The worker's own process: messages whole and in order, errors as themselves, deaths noticed on both sides."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_worker_process.channel import DONE, RUN, Channel

from kernel_core import ConfigError, Engine, EngineDeadError, SamplingParams


def pair() -> tuple[Channel, Channel]:
    return tuple(map(Channel, socket.socketpair()))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=1 << 16) | st.just(b"x" * (1 << 20))), max_size=6))
def test_messages_arrive_whole_and_in_order(messages):
    ours, theirs = pair()
    sender = threading.Thread(target=lambda: [ours.send(*message) for message in messages])
    sender.start()
    assert [theirs.receive(10) for _ in messages] == messages
    sender.join()


def test_two_full_pipes_do_not_wait_for_each_other():
    ours, theirs = pair()
    big, received = b"x" * (4 << 20), []

    def exchange(end: Channel) -> None:
        end.send(RUN, big)
        received.append(end.receive(60))

    threads = [threading.Thread(target=exchange, args=(end,)) for end in (ours, theirs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert received == [(RUN, big)] * 2


def test_an_end_that_is_gone_raises_eof_in_receive_and_in_send():
    ours, theirs = pair()
    theirs.send(DONE, b"last")
    theirs.close()
    assert ours.receive(1) == (DONE, b"last")
    with pytest.raises(EOFError):
        ours.receive(1)
    with pytest.raises(EOFError):
        ours.send(RUN, b"x" * (1 << 20))


# ---- with a model ----------------------------------------------------------------------------------------------------


def engine_of(model, **keys) -> Engine:
    return Engine(model=str(model), device="cpu", executor="worker_process", **keys)


def process_of(engine: Engine) -> subprocess.Popen:
    return engine.core.executor._process


def test_the_engine_overlaps_and_closing_ends_the_process(byte_model):
    engine = engine_of(byte_model, plugins={"worker_process": {"close_seconds": 60.0}})
    process = process_of(engine)
    assert type(engine.core.loop).__name__ == "OverlappedLoop"
    engine.add_request("x", "Hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    outputs = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert len(outputs[-1].outputs[0].token_ids) == 4
    engine.close()
    engine.close()
    assert process.returncode == 0
    with pytest.raises(EngineDeadError, match="closed"):
        engine.step()


def test_errors_at_the_start_are_the_workers_own(byte_model):
    with pytest.raises(ConfigError, match=r"engine\.dtype"):
        engine_of(byte_model, dtype="float16")


def test_a_worker_that_does_not_stop_is_killed_in_time(byte_model):
    engine = engine_of(byte_model, plugins={"worker_process": {"close_seconds": 0.5}})
    process = process_of(engine)
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 5 and process.returncode == -signal.SIGKILL


def test_a_worker_that_hangs_in_a_step_is_killed_and_named(byte_model):
    engine = engine_of(byte_model, plugins={"worker_process": {"step_seconds": 1.0}})
    process = process_of(engine)
    engine.add_request("x", "Hello", SamplingParams(max_tokens=4))
    os.kill(process.pid, signal.SIGSTOP)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [("hung" in o.error, "step_seconds" in o.error) for o in outputs] == [(True, True)]
    with pytest.raises(EngineDeadError, match="hung"):
        engine.step()
    assert process.returncode == -signal.SIGKILL
    engine.close()


PARENT = """
import sys, time
from kernel_core import Engine
engine = Engine(model=sys.argv[1], device="cpu", executor="worker_process")
print(engine.core.executor._process.pid, flush=True)
time.sleep(60)
"""


def test_the_worker_ends_when_its_engine_is_killed(byte_model):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(byte_model)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(worker)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
