"""What `kernel serve` refuses before anything starts, its listener, and when it gives up."""

import socket

import pytest
from kernel_openai_server import listener
from kernel_openai_server.section import ServerSection
from kernel_openai_server.serve import with_flags
from kernel_openai_server.supervise import FIRST_DELAY, LONGEST_DELAY, STEADY, Restarts

from kernel_core.api import ConfigError, KernelConfig
from kernel_core.cli import main


@pytest.fixture
def refusal(byte_model, capsys):
    """Run `kernel serve` with something that cannot work → what it says."""

    def run(*arguments: str, code: int = 2) -> str:
        assert main(["serve", "-m", str(byte_model), "--device", "cpu", *arguments]) == code
        return capsys.readouterr().err

    return run


def test_impossible_combinations_are_refused(refusal, tmp_path):
    assert "TLS needs both ssl_certfile and ssl_keyfile" in refusal("--ssl-certfile", "x.pem")
    assert "leave out host and port, or uds" in refusal("--uds", str(tmp_path / "s"), "--port", "0")
    assert "no such file" in refusal("--ssl-certfile", "x.pem", "--ssl-keyfile", "y.pem")
    assert "api_processes" in refusal("--api-processes", "0")


def test_a_port_in_use_is_refused_with_what_to_do(refusal):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port (0: any free one)" in refusal("--port", str(taken.getsockname()[1]))
    assert "no address of this machine" in refusal("--host", "no.such.host.invalid")


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why_and_the_exit_code_is_1(refusal):
    assert "kv_blocks" in refusal("--port", "0", "--set", "engine.kv_blocks=2", "--set", "engine.max_model_len=250", code=1)


def test_flags_override_the_section_and_leave_the_rest():
    config = KernelConfig(plugins={"openai_server": {"port": 1, "root_path": "/x"}})
    given = {"port": 2, "host": None, "api_keys": ["a", "b"], "model": "other"}
    assert with_flags(config, given).plugins["openai_server"] == {"port": 2, "root_path": "/x", "api_keys": ["a", "b"]}
    assert with_flags(KernelConfig(plugins={"openai_server": True}), {"port": 3}).plugins["openai_server"] == {"port": 3}


def test_a_stale_unix_socket_is_replaced_and_a_used_one_is_not(tmp_path):
    path = tmp_path / "s"
    section = ServerSection(uds=str(path))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with listener.bound(section) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match="another server serves on"), listener.bound(section):
            pass
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"), listener.bound(section):
        pass
    assert path.read_text() == "precious"


def test_the_printed_address_has_the_chosen_port():
    section = ServerSection(port=0, root_path="/llm")
    with listener.bound(section) as bound:
        assert listener.url(bound, section) == f"http://127.0.0.1:{bound.getsockname()[1]}/llm"
    secure = ServerSection(host="::1", port=0, ssl_certfile=__file__, ssl_keyfile=__file__)
    if socket.has_ipv6:
        with listener.bound(secure) as bound:
            assert listener.url(bound, secure).startswith("https://[::1]:")


def test_pauses_between_restarts_double_and_end_and_a_steady_life_forgives():
    restarts = Restarts(3)
    assert [restarts.delay(1) for _ in range(4)] == [FIRST_DELAY, FIRST_DELAY * 2, FIRST_DELAY * 4, None]
    assert restarts.delay(STEADY + 1) == FIRST_DELAY
    assert Restarts(0).delay(STEADY + 1) is None
    many = Restarts(100)
    assert [many.delay(1) for _ in range(50)][-1] == LONGEST_DELAY
