"The script of chapter 05, with tiny values."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A copy of the benchmarks with an empty results folder, and a tree of ten classes of noise, each of another color."
    path, rng = tmp_path_factory.mktemp("ladder"), np.random.default_rng(0)
    shutil.copytree(ROOT / "benchmarks", path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (path / "benchmarks" / "results").mkdir()
    for part, n in (("train", 40), ("test", 1)):
        for c in range(10):
            folder = path / "tree" / part / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(n): Image.fromarray((rng.integers(0, 60, (32, 32, 3)) + 19 * np.array([c, 9 - c, c * 7 % 10])).astype(np.uint8)).save(folder / f"{i}.png")
    return path


def ladder(place, *args):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "benchmarks/ladder.py", "--device", "cpu", *args], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ablation_goes_on_where_it_stopped(place):
    args = ["--data_dir", "tree", "--scale", ".125", "--fraction", "1", "--epochs", "2", "--batch_size", "16", "--only", "kernel 7", "kernel 11", "GELU"]
    out = ladder(place, *args, "--seeds", "1")
    assert out.count("seed 0") == 3
    result = json.loads((place / "benchmarks/results/ladder_cpu.json").read_text())
    assert "TREE" in result["command"] and (place / "benchmarks/results/ladder_cpu.png").exists()
    by_name = {s["rung"]: s for s in result["summary"]}
    assert by_name["kernel 7"]["delta"] is None  # kernel 5 was not trained
    for name in ("kernel 11", "GELU"):  # both stand on 7
        assert by_name[name]["base"] == "kernel 7" and by_name[name]["delta"] == pytest.approx(by_name[name]["val_top1"] - by_name["kernel 7"]["val_top1"])
    assert by_name["kernel 11"]["macs"] > by_name["kernel 7"]["macs"] == by_name["GELU"]["macs"]
    assert min(r["val_top1"] for r in result["runs"]) > .2  # of ten classes: they learn
    out = ladder(place, *args, "--seeds", "2")
    assert out.count("seed 0") == 0 and out.count("seed 1") == 3
    again = json.loads((place / "benchmarks/results/ladder_cpu.json").read_text())
    assert again["runs"][:3] == result["runs"] and [s["seeds"] for s in again["summary"]] == [2, 2, 2]


def test_speed(place):
    ladder(place, "--speed", "--image_size", "32", "--rounds", "2", "--batch_size", "2")
    result = json.loads((place / "benchmarks/results/ladder_speed_cpu.json").read_text())
    rows = {(r["rung"], r["mode"]): r for r in result["settings"]}
    assert len(rows) == 32 and rows["ResNet-50", "forward"]["ratio"] == 1 and result["config"]["rounds"] == 2
    assert all(r["low"] <= r["ratio"] <= r["high"] for r in rows.values())
