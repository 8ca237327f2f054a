"""One thread for every test: tensors here are tiny, and threads that wait for each other cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Lightning 2.6.6 calls jsonargparse by names that version 4.53 has replaced (lightning/pytorch/cli.py).
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import gc
import logging

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until all tests are collected: the objects that exist by then stay


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    """Run in an empty folder, without Lightning's banner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
