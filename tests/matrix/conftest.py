"""`--device NAME` runs the matrix on another device."""


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device that tests/matrix runs on")
