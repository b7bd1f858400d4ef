import sys
from pathlib import Path

import pytest
import torch
from kernel_safetensors.checkpoint import Safetensors
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
COUNT, SIZE = 6, 1 << 20


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_file({f"w{i}": torch.randn(SIZE // 4 * (1 + i % 2)) for i in range(COUNT)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def resident(folder):
    """KiB of the checkpoint's mapping that this process holds."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            mine = line.endswith(str(folder / "model.safetensors"))
        total += int(line.split()[1]) if mine and line.startswith("Rss:") else 0
    return total


def test_a_read_checkpoint_is_not_held_in_memory(folder):
    most = 0
    for _, tensor in Safetensors().tensors(str(folder)):
        tensor.sum()
        most = max(most, resident(folder))
    assert 0 < most <= 3 * SIZE // 1024  # one large tensor and the pages read around it, of nine times SIZE


def test_tensors_kept_from_earlier_still_hold_their_numbers(folder):
    kept = dict(Safetensors().tensors(str(folder)))
    torch.manual_seed(0)
    for i in range(COUNT):
        assert torch.equal(kept[f"w{i}"], torch.randn(SIZE // 4 * (1 + i % 2)))
