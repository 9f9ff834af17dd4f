import os

import pytest
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile(
    "project", deadline=None, derandomize=True, database=None
)  # same examples everywhere; no clock in a verdict
settings.register_profile("slow", settings.get_profile("project"), max_examples=500)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    settings.load_profile("slow" if config.getoption("--slow") else "project")
    config.addinivalue_line("markers", "slow: minutes; runs with --slow only")
    config.addinivalue_line("markers", "cuda: needs a GPU")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("cuda") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="cuda: there is no GPU here"))


def _cuda():
    import torch

    return torch.cuda.is_available()


# what several files share: imported when asked for, since torch takes its time


@pytest.fixture(scope="module")
def one_thread():
    "Tiny tensors: on a busy machine, waiting for a second thread takes most of the time."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run of six steps."
    from helpers_training import go

    run = tmp_path_factory.mktemp("runs") / "whole"
    go(run)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny model as a folder."
    from icl_distill.testing import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    "A run of twelve steps by the command's own function."
    from helpers_training import here

    run = tmp_path_factory.mktemp("real") / "whole"
    here(folder, run)
    return run
