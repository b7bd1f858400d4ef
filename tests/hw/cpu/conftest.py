import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("kernel_cpu") is None:
    sys.path.insert(0, str(Path(__file__).parents[3] / "hw" / "cpu"))

torch.set_num_threads(1)  # references are small; torch's threads would spin beside the kernels'

# Flags, floats per vector, products of bf16 pairs. "wide" runs the AVX-512 layouts on any machine.
WIDE = ("-march=native", "-O1", "-DKC_WIDTH=16", "-DKC_EMULATE_DOT")
VARIANTS = {"wide": (WIDE, 16, 1), "avx2": (("-march=haswell",), 8, 0)}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: compiles variants of the kernels; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.getoption("-m") or ""):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def _has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and {"avx2", "fma"} <= set(cpuinfo.read_text().split())


@pytest.fixture(params=["native", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS), "plain"])
def kernels(request, monkeypatch):
    """Every implementation in turn: of this machine, 16 floats wide with bf16 pair products, AVX2, and without a compiler."""
    from kernel_cpu import build

    compiler = build.find_compiler()
    if request.param == "plain":
        monkeypatch.setattr(build, "library", lambda: None)
    elif compiler is None:
        pytest.skip("no compiler")
    elif request.param in VARIANTS:
        flags, width, dot = VARIANTS[request.param]
        if request.param == "avx2" and not _has_avx2():
            pytest.skip("a processor without AVX2")
        library = build.open_library(build.build(compiler, flags=flags))
        assert (library.kc_simd_width(), library.kc_has_dot()) == (width, dot)
        monkeypatch.setattr(build, "library", lambda: library)
    return request.param
