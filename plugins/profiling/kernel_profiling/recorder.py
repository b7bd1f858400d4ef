"""The worker part: starts and stops profiles, runs torch.profiler, and leaves traces in the section's directory."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import profile, record_function, supported_activities

from kernel_core.api import RequestError, StepPlan, decode, encode
from kernel_core.nn.api import StepProbe
from kernel_profiling.chart import html_page
from kernel_profiling.probe import STEP, ModuleProbe
from kernel_profiling.records import Answer, Operator, Profile, Start, Step
from kernel_profiling.tables import merged

if TYPE_CHECKING:
    from kernel_profiling import ProfilingSection

PREFIX = re.compile(r"[A-Za-z0-9_-]{0,64}")


class Recorder:
    """One rank. `start` and `stop` are registered calls: they run between two steps, in the thread of the steps."""

    def __init__(
        self,
        section: ProfilingSection,
        rank: int,
        device: torch.device,
        models: Mapping[str, nn.Module],
        probes: list[StepProbe],
    ) -> None:
        self._section, self._rank, self._device, self._models, self._probes = section, rank, device, dict(models), probes
        self._session: Session | None = None

    def start(self, data: bytes) -> bytes:
        """`Start` → `Answer`."""
        return _answer(lambda: self._start(decode(data, Start)))

    def stop(self) -> bytes:
        """→ `Answer` with the profile."""
        return _answer(self._stop)

    def _start(self, asked: Start) -> None:
        if self._session is not None:
            raise RequestError("a profile is running already: stop it first")
        directory = self._directory(asked) if asked.mode == "trace" else None
        self._session = Session(self._section, asked, self._rank, self._device, self._models, self._probes, directory)

    def _directory(self, asked: Start) -> Path:
        if self._section.directory is None:
            raise RequestError("there is no place for traces: set plugins.profiling.directory")
        if not PREFIX.fullmatch(asked.prefix):
            raise RequestError("the prefix of a trace's name is made of at most 64 letters, digits, - and _")
        directory = Path(self._section.directory).expanduser()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"plugins.profiling.directory = {str(directory)!r} cannot be made: {error}") from error
        return directory

    def _stop(self) -> Profile:
        if self._session is None:
            raise RequestError("no profile is running: start one first")
        session, self._session = self._session, None
        return session.finish()


class Session(StepProbe):
    """A profile from its start to its stop; a probe that counts steps and runs torch.profiler around them."""

    def __init__(
        self,
        section: ProfilingSection,
        asked: Start,
        rank: int,
        device: torch.device,
        models: Mapping[str, nn.Module],
        probes: list[StepProbe],
        directory: Path | None,
    ) -> None:
        self._section, self._asked, self._device, self._probes, self._directory = section, asked, device, probes, directory
        self._left = asked.max_steps or section.max_steps
        self._delay = section.delay_steps if asked.mode == "trace" else 0
        self._models = models
        self._modules: ModuleProbe | None = None
        self._profiler: profile | None = None
        self._detached = False
        self.profile = Profile(rank, str(device))
        if self._traces:
            self._warm_up()
        probes.append(self)

    def begin(self, plan: StepPlan) -> None:
        if not len(plan.rows):
            return
        if self._delay:
            self._delay -= 1
            return
        if self._modules is None:
            self._modules = ModuleProbe(
                self._device, self._models, self.profile.steps.append, record_function if self._traces else None
            )
        if self._traces and self._profiler is None:
            self._profiler = self._open_profiler()
        self._modules.begin(plan)

    def end(self, plan: StepPlan, started: float, timings: Mapping[str, float]) -> None:
        if self._modules is None or not len(plan.rows):
            return
        self._modules.end(plan, started, timings)
        if self._asked.mode == "operators":
            self._close_step(self.profile.steps[-1])
        self._left -= 1
        if self._left <= 0:
            self._detach()

    def finish(self) -> Profile:
        """Take everything off, and write the files of a trace. Raises RequestError when the kernel took the probe out."""
        failed = not self._detached and self not in self._probes
        self._detach()
        if failed:
            raise RequestError("the profile failed and was given up; the worker's log says why")
        profiler, self._profiler = self._profiler, None
        if profiler is not None and self._directory is not None:
            self.profile.files = self._write(profiler, self._directory)
        return self.profile

    @property
    def _traces(self) -> bool:
        return self._asked.mode != "modules"

    def _warm_up(self) -> None:
        """The first start of torch.profiler in a process takes long, and would count as time of the first step."""
        profiler = self._open_profiler()
        with record_function("warm up"):
            torch.empty(1)
        profiler.stop()

    def _open_profiler(self) -> profile:
        section = self._section
        made = profile(
            activities=set(supported_activities()),
            record_shapes=section.record_shapes,
            profile_memory=section.profile_memory,
            with_flops=section.with_flops,
            with_stack=section.with_stack,
            acc_events=True,
        )
        made.start()
        return made

    def _close_step(self, step: Step) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        step.operators, step.trace = operators(profiler, self._device.type == "cpu"), _chrome_json(profiler)

    def _detach(self) -> None:
        if self._detached:
            return
        self._detached = True
        if self in self._probes:
            self._probes.remove(self)
        if self._modules is not None:
            self._modules.remove()
        if self._profiler is not None:
            self._profiler.stop()

    def _write(self, profiler: profile, directory: Path) -> list[str]:
        rank = self.profile.rank
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() % 10**9:09}"
        stem = "-".join(part for part in (self._asked.prefix, f"rank{rank}", stamp) if part)
        trace, page = directory / f"{stem}.json.gz", directory / f"{stem}.html"
        draft = directory / f".{stem}.part.json.gz"
        profiler.export_chrome_trace(str(draft))
        os.replace(draft, trace)
        draft = directory / f".{stem}.part.html"
        draft.write_text(html_page(self.profile.steps, f"rank {rank} on {self.profile.device}"), encoding="utf-8")
        os.replace(draft, page)
        return [str(trace), str(page)]


def operators(profiler: profile, on_host: bool) -> list[Operator]:
    """What ran. On the host also what modules do outside of torch's operators, where a device's own kernels run."""
    found = []
    for row in profiler.key_averages():
        if not row.is_user_annotation:
            found.append(Operator(row.key, row.self_cpu_time_total, row.self_device_time_total, row.count))
        elif on_host:
            name = "step" if row.key.startswith(STEP) else merged(row.key)
            found.append(Operator(f"{name}, outside operators", row.self_cpu_time_total, 0.0, row.count))
    return found


def _chrome_json(profiler: profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


def _answer(work: Any) -> bytes:
    try:
        return encode(Answer(profile=work()))
    except RequestError as error:
        return encode(Answer(error=str(error)))
