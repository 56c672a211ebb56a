"The stages for a GPU and their scripts, on the CPU with tiny values."
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, benchmark, tree

TINY = ["--device", "cpu", "--epochs", 1, "--seeds", 1, "--name", "tiny"]
NET = ["--dims", "8,16,32", "--depths", "1,1,1", "--batch_size", 16, "--warmup_epochs", 0,
       "--low_res_epochs", 0, "--ema_decay", .9]


def read(folder, name="tiny"):
    assert (folder / "results" / f"{name}.png").exists()
    return json.loads((folder / "results" / f"{name}.json").read_text())


@pytest.fixture
def cifar10(tmp_path):
    "A tree in CIFAR-10's place: four classes of noise."
    return str(tree(tmp_path / "tree", dict(train=40, test=10), (32, 32), classes=list("abcd")))


def test_cifar_stages(benchmarks, cifar10):
    def stage(name):
        benchmark(benchmarks, "gpu", name, *TINY, *NET, CONVNEXT_NB_CIFAR10=cifar10)
        return read(benchmarks)
    r = stage("cifar")
    assert list(r["summary"]) == [
        "cifar10-fast", "cifar10-fast, compiled", "stock, in the time of cifar10-fast",
        "cifar10", "cifar10, compiled"]
    assert r["torch"] == torch.__version__ and cifar10 not in r["command"]
    for s in r["summary"].values():
        assert 0 <= s["test_top1"] <= 1 and 0 <= s["test_top1_tta"] <= 1
        assert s["total_seconds"] > s["seconds"]
    assert r["runs"][1]["config"]["compile"]
    assert (benchmarks / "results" / "tiny_errors.png").exists()
    again = stage("best")  # it goes on
    assert list(again["summary"]) == [*r["summary"], "cifar10-best"]
    assert again["runs"][:5] == r["runs"]


def test_study_stage(benchmarks, cifar10):
    def study(minutes):
        benchmark(benchmarks, "gpu", "study", *TINY, "--only", "kernels 3x3", "--minutes", minutes,
                  "--amp_dtype", "float32", CONVNEXT_NB_CIFAR10=cifar10)
        return read(benchmarks)
    r = study(9)
    found = {(s["start"], s["change"][:5], s["seeds"]) for s in r["summary"]}
    assert found == {("stock", "stock", 1), ("stock", "kerne", 1), ("ours", "ours:", 1)}
    assert study(0)["runs"] == r["runs"]  # nothing left to do


def test_data_stage(benchmarks):
    "Here gpu.py and the script that it starts are processes, as for a user."
    small = "--images 600 --rounds 2 --steps 2 --batch_size 64 --device cpu --name tiny".split()
    p = subprocess.run([sys.executable, "benchmarks/gpu.py", "data", *small], text=True,
                       cwd=benchmarks.parent, env=os.environ | dict(PYTHONPATH=str(ROOT)),
                       capture_output=True, timeout=600)
    assert p.returncode == 0, p.stderr
    r = json.loads((benchmarks / "results" / "tiny.json").read_text())["settings"]
    assert r["torchvision_over_ours"]["ratio"] > 0 and r["waiting"]["share"] < 1


def test_kernels_stage(benchmarks):
    small = ["--model", "convnext_atto", "--image_size", 64, "--batch_size", 1, "--rounds", 2]
    benchmark(benchmarks, "gpu", "kernels", "--device", "cpu", *small, "--name", "tiny")
    r = json.loads((benchmarks / "results" / "tiny.json").read_text())
    assert {s["candidate"] for s in r["summary"]} >= {"CPUBlock", "accelerate"}
    assert {s["part"] for s in r["settings"]} == {"chain", "block", "network"}
    for s in r["settings"]:  # bfloat16 is seen, and what is wrong is named
        plain, *_ = (k["error"] for k in s["candidates"].values())
        assert (plain == 0) == (s["dtype"] == "float32") and plain < .2
    script = benchmarks / "kernels.py"
    source, right = script.read_text(), "if x.is_cuda else norm(y)"
    assert right in source
    faults = {"1.01 * norm(y)": (8, "1.0e-02"),  # four stages, two modes
              "norm(y) + (y - y.detach()).sqrt()": (4, "nan")}  # its gradient alone
    for fault, (times, error) in faults.items():
        script.write_text(source.replace(right, f"if x.is_cuda else {fault}"))
        said = benchmark(benchmarks, "kernels", "--device", "cpu", *small, "--name", "tiny",
                         "--dtypes", "float32", status=1)
        assert said.count(f"ours has an error of {error}") == times


@pytest.fixture
def ten_classes(tmp_path):
    return tree(tmp_path / "tree", dict(train=40, test=2), (32, 32), classes=list("abcdefghij"))


def test_peers_race_and_go_on(benchmarks, tmp_path):
    "Every network gets about the same time; what is done stays."
    root = tree(tmp_path / "tree", dict(train=20, test=4), (32, 32))
    def race(*budgets):
        benchmark(benchmarks, "cifar10_peers", "--data_dir", root, "--device", "cpu", "--seeds",
                  1, "--probe", 8, "--largest_batch", 8, "--name", "tiny", "--budgets", *budgets)
        return read(benchmarks)
    r = race(.5)
    assert {s["network"] for s in r["summary"]} == {
        "ConvNeXt", "plain ConvNet", "narrow ConvNet", "ResNet-18"}
    for s in r["runs"]:
        assert s["steps"] >= 1 and 0 <= s["test_top1_tta"] <= 1 and s["gmacs"] > .01
    again = race(.5, 1.9)
    assert again["runs"][:4] == r["runs"] and len(again["runs"]) == 8


def test_search_adds_a_run(benchmarks, ten_classes):
    def search(*changes):
        benchmark(benchmarks, "cifar10_search", "--data_dir", ten_classes, "--name", "tiny",
                  "images=256", "batch=32", "dims=8,16", "depths=1,1", *changes)
        return json.loads((benchmarks / "results" / "tiny.json").read_text())["runs"]
    base = search()
    kinds = ["norm=layer", "block=norms2", "stem=conv:8", "down=pool", "whiten=yes"]
    runs = search("ema=.9", "normalize=yes", *kinds)
    assert runs[:1] == base and len(runs) == 2 and runs[1]["changes"]["block"] == "norms2"
    assert all(0 <= r["val_top1"] <= 1 and r["images_per_s"] > 0 for r in runs)
    wrong = benchmark(benchmarks, "cifar10_search", "lr=1", status=1)
    assert "unknown option 'lr'" in wrong


def test_recipes(benchmarks, ten_classes):
    tiny = "epochs=1 batch_size=16 dims=8,16,16 depths=1,1,1"
    def recipes(*changes, status=0):
        return benchmark(benchmarks, "cifar10_recipes", "--data_dir", ten_classes, "--name", "tiny",
                         "--device", "cpu", "--jobs", 1, *changes, status=status)
    recipes(tiny, f"{tiny} lr=.01 adamw=.5 momentum=.9")
    said = recipes(tiny, f"{tiny} optimizer=adamw ls_init_value=None alternate_flip=False")
    assert said.count("seed 0") == 1  # the first was done before
    r = json.loads((benchmarks / "results" / "tiny.json").read_text())
    assert len(r["runs"]) == len(r["summary"]) == 3 and "TREE" in r["command"]
    assert all(0 <= s["val_top1"] <= 1 and s["epochs"] == 1 for s in r["summary"])
    assert "unknown name 'nothing'" in recipes("nothing=1", status=1)


def test_unknown_stage(benchmarks):
    assert "unknown stage 'nothing'" in benchmark(benchmarks, "gpu", "nothing", status=1)


def ladder(folder, *args):
    return benchmark(folder, "ladder", "--device", "cpu", *args)


def test_ladder_goes_on_where_it_stopped(benchmarks, ten_classes):
    args = ["--data_dir", ten_classes, "--scale", .125, "--depth", .34, "--fraction", 1,
            "--epochs", 2, "--batch_size", 16, "--only", "kernel 7", "kernel 11", "GELU"]
    assert ladder(benchmarks, *args, "--seeds", 1).count("seed 0") == 3
    r = read(benchmarks, "ladder_cpu")
    assert "TREE" in r["command"]
    rows = {s["rung"]: s for s in r["summary"]}
    assert rows["kernel 7"]["delta"] is None  # kernel 5 was not trained
    for name in ("kernel 11", "GELU"):  # both stand on 7
        delta = rows[name]["val_top1"] - rows["kernel 7"]["val_top1"]
        assert rows[name]["base"] == "kernel 7" and rows[name]["delta"] == pytest.approx(delta)
    assert rows["kernel 11"]["macs"] > rows["kernel 7"]["macs"] == rows["GELU"]["macs"]
    assert min(run["val_top1"] for run in r["runs"]) > .2  # of ten classes: they learn
    out = ladder(benchmarks, *args, "--seeds", 2)
    assert out.count("seed 0") == 0 and out.count("seed 1") == 3
    again = read(benchmarks, "ladder_cpu")
    assert again["runs"][:3] == r["runs"] and [s["seeds"] for s in again["summary"]] == [2] * 3


def test_ladder_speed(benchmarks):
    ladder(benchmarks, "--speed", "--image_size", 32, "--rounds", 2, "--batch_size", 2,
           "--scale", .125, "--depth", .34)
    r = json.loads((benchmarks / "results" / "ladder_speed_cpu.json").read_text())
    rows = {(row["rung"], row["mode"]): row for row in r["settings"]}
    assert len(rows) == 32 and rows["ResNet-50", "forward"]["ratio"] == 1
    assert r["config"]["rounds"] == 2
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values())
