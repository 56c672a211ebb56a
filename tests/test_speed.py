"The benchmark of speed: what it writes, that it sees a slow network and outlives one that fails, and the arithmetic of its floor."
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from convnext_nb.model import count_macs, create_model

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def throughput():
    "benchmarks/throughput.py as a module."
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("throughput", BENCHMARKS / "throughput.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


class Late(nn.Module):
    "A network that begins 100 ms late."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        time.sleep(.1)
        return self.net(x)


class NoRoom(nn.Module):
    "A network for which there is no memory, from its second run on."
    def __init__(self, net):
        super().__init__()
        self.net, self.runs = net, 0

    def forward(self, x):
        self.runs += 1
        if self.runs > 1: raise torch.OutOfMemoryError("out of memory: wanted 1 TiB\nof 1 GiB")
        return self.net(x)


def bench(throughput, monkeypatch, folder, *options, **nets):
    "What the benchmark writes for networks made from ours, atto at 32."
    net = lambda: create_model("convnext_atto")
    monkeypatch.setattr(throughput, "networks", lambda name: {k: wrap(net()) for k, wrap in nets.items()})
    for module in (throughput, sys.modules["common"]): monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(throughput, "peaks", lambda device, dtypes: dict(flops_per_s=dict.fromkeys(dtypes, 1e11), bytes_per_s=1e10))
    small = ["--model", "convnext_atto", "--image_size", "32", "--batch_size", "1", "--rounds", "3", "--formats", "contiguous", "--device", "cpu", "--name", "small"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *small, *options])
    throughput.main()
    return json.loads((folder / "small.json").read_text())


def test_a_slow_network_shows_and_a_failing_one_leaves_the_others(throughput, monkeypatch, tmp_path, capsys):
    same = lambda net: net
    r = bench(throughput, monkeypatch, tmp_path, ours=same, timm=same, late=Late, large=NoRoom)
    assert (tmp_path / "small.png").stat().st_size > 5000
    assert r["peaks"] == {"flops_per_s": {"float32": 1e11}, "bytes_per_s": 1e10}
    assert r["config"]["rounds"] == 3 and r["config"]["codes"] == ["eager"] and r["config"]["macs"] == count_macs(create_model("convnext_atto"), (3, 32, 32))
    assert [s["mode"] for s in r["settings"]] == ["forward", "training step"]
    for s in r["settings"]:
        assert (s["dtype"], s["memory_format"], s["code"], s["rounds"]) == ("float32", "contiguous", "eager", 3)
        assert list(s["networks"]) == ["ours", "timm", "late"] and s["networks"]["ours"]["ratio"] == 1
        late = s["networks"]["late"]
        assert late["low"] <= late["ratio"] <= late["high"] and late["ratio"] > 1 and late["images_per_s"] < 10
        assert s["fastest_peer"] == "timm"
        for n in s["networks"].values(): assert n["floor_fraction"] == pytest.approx(n["images_per_s"] * s["floor_us"] / 1e6)
    assert [(f["mode"], f["network"], f["error"]) for f in r["failed"]] == [(m, "large", "out of memory: wanted 1 TiB") for m in ("forward", "training step")]
    out = capsys.readouterr().out
    assert out.count("large failed: out of memory") == 2 and "floor, us an image" in out


def test_without_our_network_there_is_no_ratio(throughput, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="our network ran under no setting; ours: out of memory: wanted 1 TiB"):
        bench(throughput, monkeypatch, tmp_path, "--modes", "forward", ours=NoRoom, timm=lambda net: net)
    assert json.loads((tmp_path / "small.json").read_text())["settings"] == []


def test_seconds_end_a_setting_after_three_rounds(throughput, monkeypatch, tmp_path):
    r = bench(throughput, monkeypatch, tmp_path, "--modes", "forward", "--rounds", "50", "--seconds", "0", ours=lambda net: net)
    assert r["settings"][0]["rounds"] == 3 and r["settings"][0]["fastest_peer"] is None


def test_floor(throughput):
    "convnext_tiny at 224 on a device of 790 TFLOP/s and 4.3 TB/s, in bfloat16."
    rows = throughput.work("convnext_tiny", 224)
    blocks = [r for r in rows if isinstance(r[0], throughput.ConvNeXtBlock)]
    assert sum(r[1] for r in rows) == 2 * count_macs(create_model("convnext_tiny"))
    assert len(blocks) == 18 and 2 * sum(r[3] for r in blocks) == 4_290_048  # bytes of one map of every block
    rates = dict(itemsize=2, flops_per_s=790e12, bytes_per_s=4.3e12)
    for mode, passes, times in (("forward", 13, 1), ("training step", 48, 3)):
        assert sum(o[2] for o in throughput.OPERATIONS[mode]) == passes and [sum(o[i] for o in throughput.OPERATIONS[mode]) for i in (0, 1)] == [times, 2 * times]
        floor = throughput.floor_us("convnext_tiny", 224, mode, **rates)
        flops, maps = times * 8_911_062_528 / 790e12 * 1e6, passes * 4_290_048 / 4.3e12 * 1e6
        assert max(flops, maps) < floor < flops + maps  # neither hides the other, nor do they add up
        assert throughput.floor_us("convnext_tiny", 224, mode, 2, 2 * 790e12, 2 * 4.3e12) == pytest.approx(floor / 2)
    by_hand = 0
    for n, c, side in (3, 96, 56), (3, 192, 28), (9, 384, 14), (3, 768, 7):
        one_pass, product = 2 * c * side**2 / 4.3e12, 8 * c**2 * side**2 / 790e12
        by_hand += n * 1e6 * (2 * one_pass + max(5 * one_pass, product) + max(6 * one_pass, product))
    between = throughput.floor_us("convnext_tiny", 224, "forward", **rates) - by_hand  # stem, downsamplings, classifier
    assert by_hand == pytest.approx(15.951, abs=.001) and between == pytest.approx(.714, abs=.001)


def test_peaks_are_measured(throughput):
    r = throughput.peaks(torch.device("cpu"), ["float32"])
    assert r["flops_per_s"]["float32"] > 1e9 and r["bytes_per_s"] > 1e8
