"""From steps to trees and tables. Plain Python: numbers in, numbers out."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from kernel_profiling.records import Step

KINDS = ("prefill", "decode", "mixed")


@dataclass(slots=True)
class Node:
    """A module, or a phase of the step, or the step itself, with what runs inside. Microseconds, summed over the steps."""

    name: str
    type: str = ""
    device: float = 0.0
    cpu: float = 0.0
    calls: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    def child(self, name: str, type_name: str) -> Node:
        return self.children.setdefault(name, Node(name, type_name))

    def add(self, device: float, cpu: float) -> None:
        self.device, self.cpu, self.calls = self.device + device, self.cpu + cpu, self.calls + 1

    @property
    def own(self) -> float:
        """Device time that no child accounts for."""
        return max(0.0, self.device - sum(child.device for child in self.children.values()))


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A row of the model table. `trace` are the names around it."""

    name: str
    type: str
    device_time_us: float
    own_device_time_us: float
    pct_device_time: float
    cpu_time_us: float
    invocations: int
    depth: int
    trace: str


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """A row of the summary: one operator or device kernel."""

    name: str
    device_time_us: float
    pct_device_time: float
    invocations: int


def step_tree(steps: Sequence[Step], merge: bool = False) -> Node:
    """The step, its phases, and in each the modules that ran. `merge`: numbers in module names become *, so that the layers of
    a stack are one."""
    root = Node("step")
    for step in steps:
        root.add(step.device, step.cpu)
        _add_step(root, step, merge)
    return root


def _add_step(root: Node, step: Step, merge: bool) -> None:
    on_device = step.device != step.cpu
    for name, micros in step.phases.items():
        root.child(name, "phase").add(0.0 if on_device else micros, micros)
    nodes: list[Node] = []
    for span in step.spans:
        outer = nodes[span.parent] if span.parent >= 0 else _phase(root, step, span.start + span.cpu / 2)
        node = outer.child(merged(span.path) if merge else span.path or "model", span.type)
        node.add(span.device, span.cpu)
        nodes.append(node)
        if on_device and span.parent < 0 and outer is not root:
            outer.device += span.device


def _phase(root: Node, step: Step, moment: float) -> Node:
    """The phase that a moment of the step lies in; the step itself before its first one."""
    end, last = step.lead, root
    if moment < end:
        return root
    for name, micros in step.phases.items():
        end, last = end + micros, root.children[name]
        if moment < end:
            break
    return last


def merged(path: str) -> str:
    """A module's path with * for numbers."""
    return ".".join("*" if word.isdigit() else word for word in path.split(".")) or "model"


def model_rows(root: Node) -> list[ModelRow]:
    """Depth first, in the order of the step."""
    return [
        ModelRow(
            n.name, n.type, n.device, n.own, 100 * n.device / (root.device or 1), n.cpu, n.calls, len(around), " > ".join(around)
        )
        for n, around in _walk(root, ())
    ]


def _walk(node: Node, around: tuple[str, ...]) -> Iterator[tuple[Node, tuple[str, ...]]]:
    yield node, around
    for child in node.children.values():
        yield from _walk(child, (*around, node.name))


def summary_rows(steps: Sequence[Step]) -> list[SummaryRow]:
    """Operators and device kernels, most expensive first; on a device that runs by itself only what ran there."""
    on_device = any(operator.device for step in steps for operator in step.operators)
    times: dict[str, tuple[float, int]] = {}
    for operator in (operator for step in steps for operator in step.operators):
        micros = operator.device if on_device else operator.cpu
        total, calls = times.get(operator.name, (0.0, 0))
        times[operator.name] = (total + micros, calls + operator.calls)
    whole = sum(micros for micros, _ in times.values()) or 1.0
    rows = [SummaryRow(name, micros, 100 * micros / whole, calls) for name, (micros, calls) in times.items() if micros > 0]
    return sorted(rows, key=lambda row: -row.device_time_us)


def to_csv(rows: Sequence[ModelRow] | Sequence[SummaryRow]) -> str:
    """A header and one line a row; empty without rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def by_kind(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Kinds that occur, prefill first."""
    found = {kind: [step for step in steps if step.kind == kind] for kind in KINDS}
    return {kind: steps for kind, steps in found.items() if steps}


def step_names(steps: Sequence[Step]) -> list[str]:
    """prefill, decode_1, decode_2, ...: a kind that occurs twice is numbered; decode always is."""
    seen = dict.fromkeys(KINDS, 0)
    names = []
    for step in steps:
        seen[step.kind] += 1
        number = seen[step.kind]
        names.append(step.kind if step.kind != "decode" and number == 1 else f"{step.kind}_{number}")
    return names
