"""Threads and the library of products: recorded, and used again."""
import pytest
import torch

from lorasae.linear import by_onednn
from lorasae.runs import machine
from lorasae.runs.config import Config


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = True


def test_what_is_recorded_is_used(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 3)
    x = torch.ones(2, 2)
    for threads, used, products in ((2, 2, "mkl"), (3, 3, "onednn"), (8, 3, "onednn")):
        config = Config(threads=threads, products=products)
        assert machine.settled(config) == config
        assert torch.get_num_threads() == used
        assert by_onednn(x, x) == (products == "onednn")
    assert machine.settled(Config()).threads == 3       # as many as PyTorch has
