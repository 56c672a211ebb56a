"Every test runs in one thread, and a file that somebody forgot to close is an error."
import os
import shutil

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; several tests run at once
os.environ["PYTHONWARNINGS"] = "error::ResourceWarning"  # in the processes that tests start

from helpers import ROOT, SMALL, convnext_train  # noqa: E402


def pytest_configure(config):
    for kind in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"error::{kind}")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "A run that was never interrupted."
    out = tmp_path_factory.mktemp("run") / "whole"
    p = convnext_train(*SMALL, "--out", out)
    assert p.returncode == 0 and not p.stderr, p.stderr
    last = p.stdout.splitlines()[-1]
    assert last.startswith("test accuracy ") and last.endswith(f"run folder: {out}")
    return out


@pytest.fixture
def benchmarks(tmp_path):
    "A copy of the benchmarks, with no results."
    path = tmp_path / "project" / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", path,
                    ignore=shutil.ignore_patterns("results", "__pycache__"))
    (path / "results").mkdir()
    return path
