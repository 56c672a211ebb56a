"A network that leaves the house: the command as a process, and the benchmarks with tiny values."
import json
import signal
import subprocess
import time

import onnxruntime
import pytest
import torch
from helpers import benchmark, script, tree

from convnext_nb.deploy import load_exported
from convnext_nb.pretrained import load_model

EXPORT = script("convnext-export", "deploy:main")


@pytest.mark.parametrize("to, ending", [("onnx", ".onnx"), ("openvino", ".xml")])
def test_a_run_leaves_as_a_file(finished, tmp_path, to, ending):
    out = tmp_path / f"digits{ending}"
    p = subprocess.run([*EXPORT, finished, "--to", to, "--out", out, "--with-preprocessing"],
                       capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.count("\n") == 1, p.stderr
    assert p.stdout.startswith(f"{out}: ") and "10 classes" in p.stdout
    wanted = {".onnx": ["digits.onnx"], ".xml": ["digits.bin", "digits.xml"]}[ending]
    assert sorted(f.name for f in tmp_path.iterdir()) == wanted
    net = load_model(finished / "best.safetensors").eval()
    pixels = torch.randint(256, (3, 32, 32, 1), dtype=torch.uint8)
    cfg = net.pretrained_cfg
    x = (pixels.movedim(-1, 1) / 255 - cfg["mean"][0]) / cfg["std"][0]
    with torch.no_grad(): right = net(x).softmax(-1)
    assert torch.allclose(load_exported(out)(pixels), right, atol=1e-5)
    if to == "onnx":  # for who has ONNX Runtime and nothing of ours
        session = onnxruntime.InferenceSession(out)
        facts = session.get_modelmeta().custom_metadata_map
        assert json.loads(facts["classes"]) == list("0123456789")
        probabilities, = session.run(None, {"images": pixels.numpy()})
        assert torch.allclose(torch.from_numpy(probabilities), right, atol=1e-5)


def test_a_killed_export_leaves_no_file(finished, tmp_path):
    out = tmp_path / "digits.onnx"
    p = subprocess.Popen([*EXPORT, finished, "--out", out])
    while not list(tmp_path.glob(".export.*")):  # it has begun to write
        assert p.poll() is None
        time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL and not out.exists()


def test_deploy_benchmark(benchmarks):
    networks = ["ours, accelerated", "ours, ONNX Runtime", "ours, int8, ONNX Runtime",
                "timm, channels_last"]
    benchmark(benchmarks, "deploy", "--models", "convnext_atto", "--size", 64, "--batches", 1, 2,
              "--threads", 1, "--rounds", 2, "--burst", .01, "--name", "tiny", "--networks",
              *networks)
    r = json.loads((benchmarks / "results" / "tiny.json").read_text())
    found = [(s["dtype"], s["batch"], sorted(s["networks"])) for s in r["settings"]]
    per_dtype = {"float32": [networks[0], networks[1], networks[3]],
                 "bfloat16": [networks[0], networks[2], networks[3]]}
    assert found == [(d, b, sorted(n)) for d, n in per_dtype.items() for b in (1, 2)]
    for s in r["settings"]:
        assert s["fastest_peer"] == networks[3] and s["rounds"] == 2
        for n in s["networks"].values():
            assert n["p50_ms"] <= n["p99_ms"] and n["start_s"] > 0 and 20 < n["peak_mb"] < 4000
    light, heavy = (r["settings"][0]["networks"][k]["peak_mb"] for k in networks[1::2])
    assert light < heavy  # no PyTorch in its process
    assert (benchmarks / "results" / "tiny.png").stat().st_size > 5000


def test_int8_benchmark(benchmarks, tmp_path):
    data = tree(tmp_path / "tree", dict(train=40, test=10), (32, 32), classes=list("abcdefghij"))
    benchmark(benchmarks, "int8", "--data_dir", data, "--kinds", "batchnorm", "--variants", "int8",
              "depthwise in float32", "--epochs", 1, "--batch_size", 64, "--rounds", 1,
              "--name", "tiny")
    r = json.loads((benchmarks / "results" / "tiny.json").read_text())
    rows = {s["file"]: s for s in r["settings"]}
    assert list(rows) == ["float32", "int8", "depthwise in float32", "dynamic",
                          "PyTorch, bfloat16"]
    assert rows["int8"]["bytes"] < rows["depthwise in float32"]["bytes"] < rows["float32"]["bytes"]
    assert all(0 <= rows[k]["test_top1"] <= 1 for k in list(rows)[:4])
