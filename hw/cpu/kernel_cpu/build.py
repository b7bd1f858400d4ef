"""Compiles the C++ kernels on first use, keeps them in a per-user cache and loads them with ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger("kernel_cpu")

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi",
    # Fused only where the source says so: the same arithmetic at every inlining, hence for every batch size.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
TUNING = (("-march=native",), ("-mcpu=native",), ())
MISSING = (
    "no working C++ compiler, so the CPU kernels run as plain torch, several times slower; "
    "install one (Debian/Ubuntu: apt install g++, Fedora: dnf install gcc-c++, conda: conda install gxx) or set CXX"
)


class BuildError(RuntimeError):
    """The compiler refused the sources; the message carries its output."""


def find_compiler() -> str | None:
    """The C++ compiler to use: ``$CXX`` if set, else the first of c++, g++ and clang++ on the path, else None."""
    if named := os.environ.get("CXX"):
        return shutil.which(named)
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def cache_dir() -> Path:
    """The per-user folder of compiled kernels; a temporary one where the home is not writable."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "kernel-cpu"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    base = Path(tempfile.gettempdir()) / f"kernel-cpu-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise BuildError(f"{base} belongs to another user; set XDG_CACHE_HOME to a writable folder")
    return base


def build(compiler: str, *, flags: Sequence[str] = (), cache: Path | None = None) -> Path:
    """Compiles the kernels unless the cache has them, and returns the shared library.

    ``flags`` replace the tuning flags (by default -march=native, or what this compiler takes for it). Safe for
    concurrent processes. Raises BuildError with the compiler's output when it fails.
    """
    cache = cache or cache_dir()
    target = cache / f"kernels-{_key(compiler, flags)}.so"
    if target.exists():
        return target
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(compiler, flags, target)
    return target


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    began = time.perf_counter()
    errors = []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for tuning in [tuple(flags)] if flags else TUNING:
            try:
                os.replace(_run_compiler(compiler, tuning, Path(folder)), target)
            except BuildError as error:
                errors.append(str(error))
            else:
                log.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - began, target)
                return
    raise BuildError(errors[0])


def _run_compiler(compiler: str, tuning: Sequence[str], folder: Path) -> Path:
    """One process per source, then the link."""
    jobs = []
    for source in sorted(SOURCES.glob("*.cpp")):
        command = [compiler, *FLAGS, *tuning, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [job.communicate()[0] for job in jobs]
    for job, output in zip(jobs, outputs, strict=True):
        if job.returncode:
            raise BuildError(f"{' '.join(map(str, job.args))}\n{output}")
    library = folder / "kernels.so"
    link = [compiler, *FLAGS, "-shared", *map(str, sorted(folder.glob("*.o"))), "-o", str(library)]
    done = subprocess.run(link, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(link)}\n{done.stdout}")
    return library


def _key(compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(repr((compiler, FLAGS, TUNING, tuple(flags), platform.machine())).encode() + version + _cpu_flags())
    return digest.hexdigest()[:20]


def _cpu_flags() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


_disabled = threading.Event()
_recording = threading.local()


def disable() -> None:
    """From now on ``library()`` is None, without a word, and the ops run as plain torch. Call it before packing weights."""
    _disabled.set()
    opened.cache_clear()


def library() -> Any:
    """What ops call: the loaded kernels, or what stands in for them in this thread; None where no compiler works."""
    return getattr(_recording, "stand_in", None) or opened()


@contextmanager
def standing_in(stand_in: Any) -> Iterator[None]:
    """In this thread ops call the functions of `stand_in` instead of the library's."""
    _recording.stand_in = stand_in
    try:
        yield
    finally:
        _recording.stand_in = None


@functools.cache
def opened() -> ctypes.CDLL | None:
    """The loaded kernels, compiled first if need be; None where no compiler works (logged once, with what to install)."""
    if _disabled.is_set():
        return None
    compiler = find_compiler()
    if compiler is None:
        log.warning(MISSING)
        return None
    try:
        return open_library(build(compiler))
    except (BuildError, OSError) as error:
        log.warning("%s\n%s", MISSING, error)
        return None


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a library that ``build`` returned and declares its functions."""
    loaded = ctypes.CDLL(str(path))
    for name, signature in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = [KINDS[kind] for kind in signature]
        function.restype = ctypes.c_int
    return loaded


KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
SIGNATURES = {
    "kc_set_threads": "i",
    "kc_threads": "",
    "kc_advise_huge": "pl",
    "kc_panel": "",
    "kc_simd_width": "",
    "kc_has_dot": "",
    "kc_linear": "pilpippipllll",
    "kc_pack": "plipll",
    "kc_pack_int8": "pilppll",
    "kc_unpack_rows": "piplpll",
    "kc_kv_page": "iii",
    "kc_kv_write": "piliiiipllpllipl",
    "kc_kv_copy": "piliiiippl",
    "kc_kv_read": "piliiiiplpp",
    "kc_attention": "pillpiliiiippplii" + "fiifppipipll",
    "kc_norm": "iiplppplppllfi",
    "kc_rotary": "ipllipllipplplii",
    "kc_gate": "iiplpll",
    "kc_gather": "plpllpl",
    "kc_argmax": "iplpll",
    "kc_mask": "plppll",
    "kc_sample": "iplpppppppppplll",
    "kc_rank": "pppppplll",
    "kc_penalise": "plppppl" + "ppppllplll",
    "kc_ban": "plpppppl" + "ppppllll",
    "kc_look_up": "plppplllll",
    "kc_replay": "pl",
}
