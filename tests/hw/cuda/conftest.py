"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device():
    """Where this session's kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """The CPU device's threads wait for one another by turning; where cores are shared that takes most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernel_cpu.threads.available_cores", lambda: 1)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Name of a case of `model_references` → the folder of a random-weight checkpoint, written once."""
    from model_references import CASES, write_checkpoint

    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_checkpoint(made[name], *CASES[name])
        return made[name]

    return make


@pytest.fixture
def feature_on_cuda(monkeypatch):
    """(feature's name, section of the plugin "cuda", other keys of engines) → a function that runs it on the device → what is
    not as with the plain engine on a CPU, which has run by then."""
    import matrix_features as matrix

    configuration = matrix.configuration

    def prepared(name, section, **others):
        def configured(features, device):
            keys = configuration(features, device)
            return keys if device == "cpu" else others | keys | {"plugins": {**keys["plugins"], "cuda": section}}

        monkeypatch.setattr(matrix, "configuration", configured)
        feature = matrix.FEATURES[name]
        wanted = matrix.plain((name,) if feature.params or feature.some else (), "cpu")
        return lambda: matrix.differences(wanted, matrix.run([feature], "cuda"), feature.abort)

    return prepared
