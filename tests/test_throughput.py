"The benchmark of speed: it sees a slow network, outlives one that fails, and its floor adds up."
import importlib.util
import json
import sys
import time

import pytest
import torch
from helpers import ROOT, benchmark
from torch import nn

from convnext_nb.model import count_macs, create_model

SMALL = ["--model", "convnext_atto", "--image_size", "32", "--rounds", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def throughput():
    "benchmarks/throughput.py as a module."
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(ROOT / "benchmarks")
        path = ROOT / "benchmarks" / "throughput.py"
        spec = importlib.util.spec_from_file_location("throughput", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


class Clock:
    "Stands for `time` in the benchmark, whatever else the machine does: 10 ms go by a look."
    def __init__(self): self.now = 0
    def monotonic(self): return time.monotonic()

    def perf_counter(self):
        self.now += .01
        return self.now


class Late(nn.Module):
    "A network that begins 100 ms late."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        sys.modules["common"].time.now += .1
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


def plain(net): return net


def bench(throughput, monkeypatch, folder, *options, **wrappers):
    "What the benchmark writes for networks made from ours, atto at 32."
    def networks(name): return {k: wrap(create_model(name)) for k, wrap in wrappers.items()}
    def peaks(device, dtypes, repeats):
        return dict(flops_per_s=dict.fromkeys(dtypes, 1e11), bytes_per_s=1e10)
    monkeypatch.setattr(throughput, "networks", networks)
    monkeypatch.setattr(throughput, "peaks", peaks)
    monkeypatch.setattr(sys.modules["common"], "RESULTS", folder)
    monkeypatch.setattr(sys.modules["common"], "time", Clock())
    own = ["--batch_size", "1", "--formats", "contiguous", "--name", "small"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *SMALL, *own, *options])
    throughput.main()
    return json.loads((folder / "small.json").read_text())


def test_some_networks_alone(throughput, monkeypatch, tmp_path):
    peers = dict(timm=plain, torchvision=plain)
    r = bench(throughput, monkeypatch, tmp_path, "--networks", "timm", ours=plain, **peers)
    assert [list(s["networks"]) for s in r["settings"]] == [["ours", "timm"]] * 2


def test_graphs_are_left_out_without_a_gpu(throughput, monkeypatch, tmp_path, capsys):
    def run(*codes):
        return bench(throughput, monkeypatch, tmp_path, "--device", "cpu", "--modes", "forward",
                     "--codes", *codes, ours=plain, timm=plain)
    assert [s["code"] for s in run("eager", "graph")["settings"]] == ["eager"]
    assert "left out: CUDA graphs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a CUDA graph needs a GPU"): run("graph")


def test_a_slow_network_shows_and_a_failing_one_leaves_the_others(
        throughput, monkeypatch, tmp_path, capsys):
    r = bench(throughput, monkeypatch, tmp_path, ours=plain, timm=plain, late=Late, large=NoRoom)
    assert (tmp_path / "small.png").stat().st_size > 5000
    assert r["peaks"] == {"flops_per_s": {"float32": 1e11}, "bytes_per_s": 1e10}
    assert r["config"]["rounds"] == 3 and r["config"]["codes"] == ["eager"]
    assert r["config"]["macs"] == count_macs(create_model("convnext_atto"), (3, 32, 32))
    assert [s["mode"] for s in r["settings"]] == ["forward", "training step"]
    for s in r["settings"]:
        setting = s["dtype"], s["memory_format"], s["code"], s["rounds"]
        assert setting == ("float32", "contiguous", "eager", 3)
        nets = s["networks"]
        assert list(nets) == ["ours", "timm", "late"] and nets["ours"]["ratio"] == 1
        late = nets["late"]
        assert late["low"] <= late["ratio"] <= late["high"]
        assert late["ratio"] == pytest.approx(11) and nets["timm"]["ratio"] == pytest.approx(1)
        assert late["images_per_s"] == pytest.approx(1 / .11)
        assert s["fastest_peer"] == "timm"
        for n in nets.values():
            share = n["images_per_s"] * s["floor_us"] / 1e6
            assert n["floor_fraction"] == pytest.approx(share)
    failed = [(f["mode"], f["network"], f["error"]) for f in r["failed"]]
    error = "out of memory: wanted 1 TiB"
    assert failed == [(mode, "large", error) for mode in ("forward", "training step")]
    out = capsys.readouterr().out
    assert out.count("large failed: out of memory") == 2 and "floor, us an image" in out


def test_without_our_network_there_is_no_ratio(throughput, monkeypatch, tmp_path):
    message = "our network ran under no setting; ours: out of memory: wanted 1 TiB"
    with pytest.raises(SystemExit, match=message):
        bench(throughput, monkeypatch, tmp_path, "--modes", "forward", ours=NoRoom, timm=plain)
    assert json.loads((tmp_path / "small.json").read_text())["settings"] == []


def test_seconds_end_a_setting_after_three_rounds(throughput, monkeypatch, tmp_path):
    options = ["--modes", "forward", "--rounds", "50", "--seconds", "0"]
    r = bench(throughput, monkeypatch, tmp_path, *options, ours=plain)
    assert r["settings"][0]["rounds"] == 3 and r["settings"][0]["fastest_peer"] is None


def test_floor(throughput):
    "convnext_tiny at 224 on a device of 790 TFLOP/s and 4.3 TB/s, in bfloat16."
    costs = throughput.layer_costs("convnext_tiny", 224)
    blocks = [c for c in costs if isinstance(c.layer, throughput.ConvNeXtBlock)]
    assert sum(c.flops for c in costs) == 2 * count_macs(create_model("convnext_tiny"))
    numbers = sum(c.outputs for c in blocks)
    assert len(blocks) == 18 and 2 * numbers == 4_290_048  # bytes of one map of every block
    rates = dict(flops_per_s=790e12, bytes_per_s=4.3e12)
    twice = dict(flops_per_s=2 * 790e12, bytes_per_s=2 * 4.3e12)
    for mode, passes, times in (("forward", 13, 1), ("training step", 48, 3)):
        sums = [sum(column) for column in zip(*throughput.BLOCK_OPERATIONS[mode])]
        assert sums == [times, 2 * times, passes]
        floor = throughput.floor_us("convnext_tiny", 224, mode, 2, **rates)
        flops = times * 8_911_062_528 / 790e12 * 1e6
        maps = passes * 4_290_048 / 4.3e12 * 1e6
        assert max(flops, maps) < floor < flops + maps  # neither hides the other
        half = throughput.floor_us("convnext_tiny", 224, mode, 2, **twice)
        assert half == pytest.approx(floor / 2)
    by_hand = 0
    for n, c, side in (3, 96, 56), (3, 192, 28), (9, 384, 14), (3, 768, 7):
        one_pass, product = 2 * c * side**2 / 4.3e12, 8 * c**2 * side**2 / 790e12
        seconds = 2 * one_pass + max(5 * one_pass, product) + max(6 * one_pass, product)
        by_hand += n * 1e6 * seconds
    forward = throughput.floor_us("convnext_tiny", 224, "forward", 2, **rates)
    assert by_hand == pytest.approx(15.951, abs=.001)
    assert forward - by_hand == pytest.approx(.714, abs=.001)  # stem, downsamplings, classifier


def test_peaks_are_measured(throughput):
    r = throughput.peaks(torch.device("cpu"), ["float32"], repeats=2)
    assert r["flops_per_s"]["float32"] > 1e9 and r["bytes_per_s"] > 1e8


def test_beside_its_peers(benchmarks):
    "The script itself, beside timm, torchvision's layout, Hugging Face and Meta's."
    benchmark(benchmarks, "throughput", *SMALL, "--batch_size", 2, "--name", "small")
    r = json.loads((benchmarks / "results" / "small.json").read_text())
    found = [(s["memory_format"], s["mode"]) for s in r["settings"]]
    assert found == [(f, m) for f in ("contiguous", "channels_last")
                     for m in ("forward", "training step")]
    for s in r["settings"]:
        assert s["networks"]["ours"]["ratio"] == 1
        peers = {"ours, accelerated", "timm", "Hugging Face", "Meta's layout"}
        assert peers <= s["networks"].keys()
        assert all(n["low"] <= n["ratio"] <= n["high"] for n in s["networks"].values())
    assert (benchmarks / "results" / "small.png").exists()
