"""Evicted KV blocks come back from host memory and disk, exactly, or not at all."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_kv_offload.disk import DiskTier, file_name, stored_names
from kernel_kv_offload.host import HostTier
from kernel_kv_offload.identity import rank_folder
from kernel_kv_offload.store import Missing, Saving, Tiers
from pydantic import ValidationError

from kernel_core import LLM, SamplingParams
from kernel_core.errors import ConfigError, EngineDeadError
from kernel_core.nn.kv import Blocks
from kernel_core.nn.transfer import Download

SIZE = 48
NAMES = [(group, bytes([number] * 4)) for group in range(2) for number in range(6)]


def block(number):
    return torch.full((SIZE,), number % 256, dtype=torch.uint8)


# ---- the tiers


@settings(deadline=None, max_examples=60)
@given(
    room=st.integers(0, 5),
    disk=st.sampled_from([None, 0, 2, 100]),
    events=st.lists(st.tuples(st.sampled_from(["put", "get", "get"]), st.integers(0, len(NAMES) - 1)), max_size=40),
)
def test_tiers_give_back_what_was_put_or_nothing(room, disk, events):
    with tempfile.TemporaryDirectory() as folder:
        limit = disk and disk * (SIZE + 74)
        on_disk = DiskTier(Path(folder), limit, "a") if disk is not None else None
        tiers = Tiers(HostTier([SIZE, SIZE], room * SIZE), on_disk)
        twin, recent = {}, []
        for step, (action, index) in enumerate(events):
            name = NAMES[index]
            if action == "put":
                if name not in tiers:
                    twin[name] = block(step)
                    tiers.put(name, twin[name])
                    recent = [*[n for n in recent if n != name], name]
                continue
            try:
                assert torch.equal(tiers.get(name), twin[name])
                recent = [*[n for n in recent if n != name], name]
            except Missing:
                assert disk != 100 or name not in twin
            except KeyError:
                pytest.fail("a block that was never put")
        assert tiers.host.used <= room * SIZE
        kept = [name for name in recent if name in tiers.host]
        tiers.close()
        if disk == 100:
            assert set(stored_names(Path(folder))) == set(twin)
        elif disk:
            assert sum(file.stat().st_size for file in Path(folder).iterdir()) <= limit
            assert not kept or kept[-1] in stored_names(Path(folder)), "the block that was used last was not kept"


def test_host_memory_gives_up_the_least_recently_used():
    host = HostTier([SIZE], 3 * SIZE)
    for number in range(3):
        assert host.put((0, bytes([number])), block(number))
    host.get((0, b"\0"))
    assert not host.put((0, b"\3"), block(3))
    name, row = host.pop()
    assert name == (0, b"\1") and torch.equal(row, block(1))
    assert host.put((0, b"\3"), block(3)) and host.names() == [(0, b"\2"), (0, b"\0"), (0, b"\3")]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other block", "other layout", "gone"])
def test_what_is_damaged_is_a_miss_and_removed(tmp_path, damage, caplog):
    tier = DiskTier(tmp_path, 1 << 20, "layout")
    for name in NAMES[:2]:
        tier.put(name, bytes(block(7).tolist()))
    path, other = (tmp_path / file_name(name) for name in NAMES[:2])
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other block":
        path.write_bytes(other.read_bytes())
    elif damage == "other layout":
        tier = DiskTier(tmp_path, 1 << 20, "another")
    else:
        path.unlink()
    assert tier.get(NAMES[0]) is None and NAMES[0] not in tier and not path.exists()
    assert ("damaged" in caplog.text) == (damage != "gone")
    if damage != "other layout":
        assert tier.get(NAMES[1]) == bytes(block(7).tolist())


def test_the_disk_keeps_its_limit_across_restarts(tmp_path):
    tier = DiskTier(tmp_path, 3 * (SIZE + 74), "a")
    for number, name in enumerate(NAMES[:5]):
        tier.put(name, bytes(block(number).tolist()))
    assert stored_names(tmp_path) == NAMES[2:5]
    assert tier.get(NAMES[2]) is not None
    smaller = DiskTier(tmp_path, SIZE + 74, "a")
    assert stored_names(tmp_path) == [NAMES[2]] and smaller.get(NAMES[2]) == bytes(block(2).tolist())


def test_a_disk_that_takes_nothing_costs_hits_only(tmp_path, caplog):
    tier = DiskTier(tmp_path, 1 << 20, "a")
    tiers = Tiers(HostTier([SIZE], SIZE), tier)
    for number in range(1, 4):  # a folder where the file should be: writing ends in an error
        (tmp_path / file_name((0, bytes([number])))).mkdir()
    for number in range(1, 6):
        tiers.put((0, bytes([number])), block(number))
    assert torch.equal(tiers.get((0, b"\5")), block(5))
    tiers.close()
    assert caplog.text.count("the disk takes none") == 1 and not list(tmp_path.glob("*.tmp"))
    assert tier.get((0, b"\5")) == bytes(block(5).tolist()) and tier.get((0, b"\4")) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "weights.other"])
def test_other_weights_have_another_folder(tmp_path, name):
    """Whatever the format of a checkpoint, its files tell it from another one of the same configuration."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / name
    file.write_bytes(b"12")
    section = SimpleNamespace(disk_path=tmp_path / "disk")
    config = SimpleNamespace(plugins={}, device="cpu", engine=SimpleNamespace(dtype="float32", block_size=16))
    model = SimpleNamespace(path=str(file.parent), config={})
    context = SimpleNamespace(section=section, config=config, model=model)
    first, again = rank_folder(context, 0), rank_folder(context, 0)
    file.write_bytes(b"123")
    assert first == again != rank_folder(context, 0)
    config.engine.block_size = 32
    assert len({rank_folder(context, rank) for rank in (0, 1)} | {first}) == 3


# ---- engines

COMMON = dict(model="tiny-chat", dtype="float32", max_model_len=128, max_requests=4, block_size=16, kv_blocks=14, threads=1)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SUBJECTS = ["os.path.join", "textwrap.dedent", "json.dumps", "shutil.copy", "random.shuffle"]
PROMPTS = [f"<|user|>{'Tell me please, ' * 12}what does {name} do?<|end|><|assistant|>" for name in SUBJECTS]
PROMPTS = [f"<|user|>{name} {prompt[8:]}" for name, prompt in zip(SUBJECTS, PROMPTS)]


def engine(path=None, host=0.1, **options):
    section = {"host_gib": host} | ({"disk_path": str(path)} if path else {})
    plugins = {"prefix_caching": {}, "kv_offload": section} | options.pop("plugins", {})
    return LLM(**COMMON | options, plugins=plugins)


def ask(llm, prompts=PROMPTS):
    """One after the other, so that each evicts what came before."""
    outputs = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]


@pytest.fixture(scope="module")
def plain():
    with LLM(**COMMON) as llm:
        return ask(llm)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"overlap": False, "max_tokens_per_step": 7},
        {"plugins": {"worker_process": {}}},
        {"plugins": {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False}}, "kv_blocks": 16},
        {"plugins": {"draft_model": {"model": "tiny-draft", "adaptive": False}}, "kv_blocks": 16},
    ],
    ids=["plain", "overlapped", "chunks", "worker process", "eagle", "draft model"],
)
def test_evicted_blocks_come_back(plain, options):
    with engine(**options) as llm:
        first, cached = ask(llm)
        again, cached_again = ask(llm)
    assert first == again == plain
    assert max(cached) < 32 and min(cached_again) >= 48


@pytest.fixture
def slow_copies(monkeypatch):
    """What leaves the device arrives when it is asked for the fourth time, or waited for. → how long each took."""
    taken = []

    def begin(self, tensors, device):
        self.number, self._tensors, self._event = len(taken), {name: t.clone() for name, t in tensors.items()}, None
        taken.append(0)

    def arrived(self):
        taken[self.number] += 1
        return taken[self.number] > 3

    late = type("LateDownload", (Download,), {"__init__": begin, "arrived": arrived})
    monkeypatch.setattr("kernel_core.nn.kv.Download", late)
    return taken


@pytest.mark.parametrize(
    "options", [{"overlap": True}, {"overlap": False, "max_tokens_per_step": 7}], ids=["overlapped", "chunks"]
)
def test_blocks_are_saved_while_steps_run(plain, slow_copies, options):
    with engine(**options) as llm:
        assert ask(llm)[0] == plain
        again, cached = ask(llm)
    assert again == plain and min(cached) >= 48
    assert len(slow_copies) > 5 and max(slow_copies) > 3


def test_blocks_that_leave_the_device_at_the_end_reach_the_disk(plain, slow_copies, tmp_path, monkeypatch):
    order, put, flush = [], Tiers.put, Tiers.flush
    monkeypatch.setattr(Tiers, "put", lambda *args: order.append("put") or put(*args))
    monkeypatch.setattr(Tiers, "flush", lambda tiers: order.append("flush") or flush(tiers))
    with engine(tmp_path, kv_blocks=64) as llm:
        ask(llm, PROMPTS[:2])
    assert slow_copies and max(slow_copies) <= 3, "they were waited for"
    assert order[:2] == ["put", "put"] and "put" not in order[order.index("flush") :]
    with engine(tmp_path, host=0) as llm:
        again, cached = ask(llm, PROMPTS[:2])
    assert again == plain[:2] and min(cached) >= 48


def test_blocks_that_leave_the_device_when_the_engine_dies_reach_the_disk(plain, slow_copies, tmp_path, monkeypatch):
    llm = engine(tmp_path)
    ask(llm, PROMPTS[:3])
    runner = llm.engine.core.executor._worker.runner
    llm.engine.add_request("the next", PROMPTS[3], GREEDY)
    while not runner._going_on:
        llm.engine.step()
    monkeypatch.setattr(runner, "submit", None)
    with pytest.raises(EngineDeadError):
        while True:
            llm.engine.step()
    llm.close()
    with engine(tmp_path, host=0) as again:
        answers, cached = ask(again, PROMPTS[:1])
    assert answers == plain[:1] and cached[0] >= 48


class Copied:
    """Blocks whose copies are complete when they are waited for."""

    bytes_per_block = (SIZE,)

    def read(self, group, ids):
        content = torch.stack([block(number) for number in ids])
        return SimpleNamespace(arrived=lambda: False, arrays=lambda: {"blocks": content.numpy()})


def test_what_is_evicted_again_while_it_is_saved_is_kept_once():
    tiers = Tiers(HostTier([SIZE], 5 * SIZE), None)
    one, other = (Saving(Copied(), tiers) for _ in range(2))
    one.begin(0, [1, 2], [b"a", b"b"])
    other.begin(0, [3, 4], [b"b", b"c"])
    for saving in (one, other, one):
        assert not saving.done(0) or saving is one
        saving.finish()
        assert not saving.moves
    assert [int(tiers.get((0, key))[0]) for key in (b"a", b"b", b"c")] == [1, 2, 4] and tiers.host.used == 3 * SIZE


def test_a_job_that_cannot_save_says_so_as_often_as_it_is_asked_and_holds_nothing(monkeypatch):
    tiers = Tiers(HostTier([SIZE], 5 * SIZE), None)
    saving = Saving(Copied(), tiers)
    saving.begin(0, [1, 2], [b"a", b"b"])
    saving.begin(0, [3], [b"c"])
    monkeypatch.setattr(HostTier, "_take", lambda *args: (_ for _ in ()).throw(RuntimeError("no memory can be pinned")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="pinned"):
            saving.finish()
        assert not saving.moves


def test_without_it_they_are_computed_again(plain):
    with LLM(**COMMON, plugins={"prefix_caching": {}}) as llm:
        ask(llm)
        again, cached = ask(llm)
    assert again == plain and max(cached) < 32


def test_the_disk_survives_a_restart(plain, tmp_path):
    with engine(tmp_path) as llm:
        ask(llm)
    with engine(tmp_path, host=0) as llm:
        again, cached = ask(llm)
    assert again == plain and min(cached) >= 48
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "options",
    [{"overlap": True}, {"plugins": {"worker_process": {}}}, {"host": 0}],
    ids=["overlapped", "worker process", "no host"],
)
def test_what_is_still_on_the_device_at_the_end_survives_too(plain, tmp_path, options):
    with engine(tmp_path, kv_blocks=64, **options) as llm:
        ask(llm, PROMPTS[:2])
        llm.engine.add_request("never finished", PROMPTS[2], GREEDY)
        for _ in range(3):
            llm.engine.step()
        assert not list(tmp_path.rglob("*.kv")), "the pool was large enough"
    with engine(tmp_path, **{"host": 0} | options) as llm:
        again, cached = ask(llm, PROMPTS[:3])
    assert again == plain[:3] and min(cached) >= 48


def test_an_engine_that_died_still_closes(plain, tmp_path, caplog):
    """What it kept is lost, as a crash loses it; what its files hold is not."""
    with engine(tmp_path) as llm:
        ask(llm)
        llm.engine.core.executor.submit = None  # as if the workers were gone
    assert "before all KV was stored" in caplog.text
    with engine(tmp_path, host=0) as llm:
        assert ask(llm)[0] == plain


def test_damaged_files_change_no_answer(plain, tmp_path):
    with engine(tmp_path) as llm:
        ask(llm)
    for number, file in enumerate(sorted(tmp_path.rglob("*.kv"))):
        content = bytearray(file.read_bytes())
        content[-1 - number % 999] ^= 4
        file.write_bytes(content)
    with engine(tmp_path, host=0) as llm:
        again, cached = ask(llm)
    assert again == plain and max(cached) < 32


def test_another_checkpoint_finds_nothing(tmp_path):
    with engine(tmp_path) as llm:
        ask(llm, PROMPTS[:3])
    with engine(tmp_path, model="tiny-draft") as llm:
        assert max(ask(llm, PROMPTS[:3])[1]) < 32


def test_a_request_may_be_aborted_while_its_blocks_are_loaded(plain):
    with engine() as llm:
        ask(llm)
        core = llm.engine.core
        ids = [llm.engine.add_request(str(number), prompt, GREEDY) for number, prompt in enumerate(PROMPTS[:2])]
        llm.engine.abort(["0"])
        finished = {}
        while llm.engine.has_unfinished_requests():
            finished |= {o.request_id: o for o in llm.engine.step() if o.finished}
        assert list(finished["1"].outputs[0].token_ids) == plain[1]
        core.scheduler.check()
        assert ask(llm)[0] == plain and ids


def test_a_reset_forgets_what_is_stored_on_the_device_only(plain):
    with engine() as llm:
        ask(llm)
        llm.reset_cache()
        assert ask(llm)[0] == plain


@pytest.mark.parametrize("plain_path", [False, True], ids=["compiled", "torch"])
def test_blocks_are_restored_bit_for_bit(plain_path, monkeypatch):
    if plain_path:
        from kernel_cpu import build

        monkeypatch.setattr(build, "library", lambda: None)
    with LLM(**COMMON) as llm:
        llm.generate(PROMPTS[:2], GREEDY)
        blocks = Blocks(llm.engine.core.executor._worker.runner.kv)
        read = lambda ids: torch.from_numpy(blocks.read(0, ids).arrays()["blocks"])  # noqa: E731
        before = read([1, 2, 3])
        assert before.shape == (3, blocks.bytes_per_block[0]) and before.dtype == torch.uint8
        assert len(np.unique(before.numpy())) > 100
        blocks.write(0, [9, 7, 8], before)
        assert torch.equal(read([9, 7, 8]), before) and torch.equal(read([1, 2, 3]), before)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises((ConfigError, ValidationError), match="nowhere to keep blocks"):
        engine(host=0)
    with pytest.raises(ConfigError, match="a prefix index gives up, and there is none"):
        engine(plugins={"prefix_caching": False})
