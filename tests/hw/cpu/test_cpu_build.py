import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cpu import attention, build, linear, threads

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no compiler")
HOME = Path(build.__file__).parents[1]


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.opened.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "kernel_cpu"):
            x, weight = torch.randn(2, 8), torch.randn(3, 8)
            torch.testing.assert_close(linear.linear(x, linear.pack(weight)), x @ weight.t())
            attention.allocate_kv(2, 16, 1, 8)
        assert len(caplog.records) == 1
        assert "apt install g++" in caplog.text
    finally:
        build.opened.cache_clear()


def test_a_compiler_that_fails_is_as_good_as_none(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such luck\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.opened.cache_clear()
    try:
        assert build.library() is None
        assert "no such luck" in caplog.text
    finally:
        build.opened.cache_clear()


def test_disabled_kernels_run_as_torch_silently(caplog):
    try:
        build.disable()
        assert build.library() is None
        assert not linear.pack(torch.randn(3, 8)).panel
        assert not caplog.records
    finally:
        build._disabled.clear()
        build.opened.cache_clear()


BUILD = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from kernel_cpu import build
build.SOURCES = Path(sys.argv[2])
print(build.build(build.find_compiler(), flags=["-O0"], cache=Path(sys.argv[3])))
"""


@needs_compiler
def test_concurrent_builds_make_one_library(tmp_path):
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    cache = tmp_path / "cache"
    cache.mkdir()
    command = [sys.executable, "-c", BUILD, str(HOME), str(sources), str(cache)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {job.communicate()[0].strip() for job in jobs}
    assert all(job.returncode == 0 for job in jobs)
    assert len(paths) == 1 and Path(paths.pop()).exists()
    assert len(list(cache.glob("*.so"))) == 1
    assert not [p for p in cache.iterdir() if p.is_dir()]


TARGETS = ["x86-64", "haswell", "skylake-avx512", "cooperlake"] if os.uname().machine == "x86_64" else []


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_instruction_sets_compile(target, tmp_path):
    jobs = []
    for source in sorted(build.SOURCES.glob("*.cpp")):
        output = ["-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        command = [build.find_compiler(), *build.FLAGS, f"-march={target}", *output]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    errors = [job.communicate()[1] for job in jobs]
    if any(target in e and "march" in e for e in errors):
        pytest.skip(f"this compiler does not know {target}")
    assert not any(job.returncode for job in jobs), errors


def product(queue=None):
    torch.manual_seed(0)
    result = linear.linear(torch.randn(8, 512), linear.pack(torch.randn(700, 512))).sum().item()
    if queue is not None:
        queue.put(result)
    return result


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_pool_survives_new_processes(start):
    expected = product()
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=product, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(10)
    assert child.exitcode == 0
    assert product() == expected


def test_calls_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    packed, x = linear.pack(torch.randn(700, 512)), torch.randn(8, 512)
    expected = linear.linear(x, packed)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: linear.linear(x, packed), range(200)):
            assert torch.equal(result, expected)


@needs_compiler
def test_thread_count():
    try:
        assert threads.num_threads() >= 1
        threads.set_num_threads(3)
        assert threads.num_threads() == 3
        product()
        with pytest.raises(ValueError):
            threads.set_num_threads(0)
    finally:
        threads.set_num_threads()
    assert threads.num_threads() == threads.available_cores()


@needs_compiler
def test_idle_workers_sleep():
    product()
    before = os.times()
    import time

    time.sleep(0.3)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.1
