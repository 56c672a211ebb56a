r"""ConvNeXt behind a server's door, on a CPU: ours in every form, timm, ONNX Runtime, OpenVINO.

    python benchmarks/deploy.py                                        convnext_tiny, batch 1 and 8
    python benchmarks/deploy.py --models convnext_tiny convnext_atto --batches 1 8 32 --threads 1 2

ours: eager; `accelerate(fold(net))`; that compiled; files of `export_model` in ONNX Runtime,
OpenVINO and AOTInductor, and its int8 file, calibrated on random images (speed alone is measured
here; accuracy: benchmarks/int8.py). Peers: timm eager in both memory formats, compiled, and its
export by torch's exporter in ONNX Runtime and OpenVINO. All PyTorch processes keep freed memory
(chapter 07), the peers' too. bfloat16 is bfloat16 weights, in OpenVINO its precision hint.

Every network runs in a process of its own. In a round each runs once, in a random order, for
--burst seconds after one call that warms up, while all others wait. Speed is the median over the
rounds; `ratio` is the median over rounds of a network's time by that of the fastest peer in the
same round; latency is the median and the 99th percentile of all calls. `start_s` is the time from
starting the process to its first logits, `peak_mb` its memory then; the first process of a runtime
also reads its libraries from the disk. Writes deploy_cpu.json and deploy_cpu.png.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import openvino
import timm
import torch
from common import (
    RESULTS,
    environment,
    interleaved,
    make_parser,
    median_ratio,
    result_path,
    write_result,
)
from PIL import Image

from convnext_nb import deploy
from convnext_nb.model import create_model

WORKER = Path(__file__).with_name("deploy_worker.py")
# label -> kind of worker, file, dtypes
NETWORKS = {
    "ours": ("ours", None, "both"),
    "ours, accelerated": ("ours, accelerated", None, "both"),
    "ours, compiled": ("ours, compiled", None, "both"),
    "ours, AOTInductor": ("aot", "ours_{dtype}.pt2", "both"),
    "ours, ONNX Runtime": ("onnxruntime", "ours.onnx", "float32"),
    "ours, OpenVINO": ("openvino", "ours.onnx", "both"),
    "ours, int8, ONNX Runtime": ("onnxruntime", "int8.onnx", "bfloat16"),
    "ours, int8, OpenVINO": ("openvino", "int8.onnx", "bfloat16"),
    "timm": ("timm", None, "both"),
    "timm, channels_last": ("timm, channels_last", None, "both"),
    "timm, compiled": ("timm, compiled", None, "both"),
    "timm, ONNX Runtime": ("onnxruntime", "timm.onnx", "float32"),
    "timm, OpenVINO": ("openvino", "timm.onnx", "both"),
}


def write_timm(model, size, path):
    "timm's network by torch's exporter."
    net, x = timm.create_model(model).eval(), torch.randn(2, 3, size, size)
    with deploy._quiet():
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False,
                                    dynamic_shapes=({0: torch.export.Dim("batch")},))
        program.save(path)


def noise(n, size):
    "Images to calibrate with where accuracy does not matter."
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (n, size, size, 3), np.uint8)
    return [Image.fromarray(x) for x in arrays]


def write_files(a, model, folder):
    "The files that the networks of a model are read from."
    net = create_model(model).eval()
    net.pretrained_cfg = dict(input_size=(3, a.size, a.size))
    # random weights and images: whether the classes agree means nothing here
    deploy._compare_int8 = lambda *_: {}
    write = {"timm.onnx": lambda path: write_timm(model, a.size, path),
             "int8.onnx": lambda path: deploy.export_model(net, path,
                                                           calibrate=noise(32, a.size))}
    paths = {NETWORKS[k][1].format(dtype=d) for d in a.dtypes for k in a.networks
             if NETWORKS[k][1]}
    for name in sorted(paths):
        def ours(path): deploy.export_model(net, path, half="bfloat16" in path.name)
        write.get(name, ours)(folder / name)


class Worker:
    "A network in a process of its own."
    def __init__(self, **spec):
        env = os.environ | dict(OMP_NUM_THREADS=str(spec["threads"]))
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, WORKER, json.dumps(spec)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        self.facts = self.answer()
        self.facts["start_s"] = time.perf_counter() - start
        self.seconds = {}  # batch -> of a call, as last seen

    def answer(self):
        line = self.process.stdout.readline()
        if not line: raise RuntimeError(f"a process ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, batch, calls):
        "Seconds of so many calls."
        self.process.stdin.write(json.dumps([batch, calls]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self, batch, burst):
        "Seconds of the calls of a burst."
        if batch not in self.seconds: self.seconds[batch] = min(self.ask(batch, 2))
        seconds = self.ask(batch, max(1, round(burst / self.seconds[batch])))
        self.seconds[batch] = statistics.median(seconds)
        return seconds

    def __enter__(self): return self
    def __exit__(self, *_): self.process.kill(), self.process.wait()


def start_workers(stack, a, folder, model, dtype, threads):
    "A worker for each network that has this dtype."
    workers = {}
    for label in a.networks:
        kind, path, dtypes = NETWORKS[label]
        if dtypes not in ("both", dtype): continue
        path = path and str(folder / path.format(dtype=dtype))
        w = Worker(kind=kind, path=path, model=model, dtype=dtype, threads=threads, size=a.size)
        workers[label] = stack.enter_context(w)
        if path: w.facts["file_mb"] = Path(path).stat().st_size / 1e6
    return workers


def measure(a, workers, batch):
    "Speed and latency of each worker."
    for w in workers.values(): w.run(batch, 0)  # compiles
    rounds = {label: [] for label in workers}
    for _, label in interleaved(list(workers), a.rounds, a.seconds):
        rounds[label].append(workers[label].run(batch, a.burst))
    times = {k: [statistics.median(s) for s in r] for k, r in rounds.items()}
    peers = [k for k in times if k.startswith("timm")]
    fastest = min(peers, key=lambda k: statistics.median(times[k]))
    rows = {}
    for label, mine in times.items():
        calls = [s for r in rounds[label] for s in r]
        p50, p99 = np.percentile(calls, [50, 99]) * 1e3
        ratio = median_ratio([t / p for t, p in zip(mine, times[fastest])])
        rows[label] = dict(images_per_s=batch / statistics.median(mine), **ratio, p50_ms=p50,
                           p99_ms=p99, calls=len(calls), **workers[label].facts)
    return dict(fastest_peer=fastest, rounds=len(times[fastest]), networks=rows)


def draw(rows, path):
    "A panel for each dtype and model: how many times as fast as the fastest peer, by batch."
    rows = [r for r in rows if r["threads"] == max(r["threads"] for r in rows)]
    models, dtypes = (list(dict.fromkeys(r[k] for r in rows)) for k in ("model", "dtype"))
    keys, shape = list(itertools.product(models, dtypes)), (len(models), len(dtypes))
    labels = [k for k in NETWORKS if any(k in r["networks"] for r in rows)]
    fig, axes = plt.subplots(*shape, figsize=(2 + 3.2 * shape[1], .8 + 3.4 * shape[0]),
                             sharey=True, squeeze=False, layout="constrained")
    for ax, key in zip(axes.flat, keys):
        mine = [r for r in rows if (r["model"], r["dtype"]) == key]
        for i, r in enumerate(mine):
            shift = .24 * (i - (len(mine) - 1) / 2)  # one batch does not hide another
            dots = [(1 / n["ratio"], labels.index(k) + shift) for k, n in r["networks"].items()]
            ax.plot(*zip(*dots), "osD"[i % 3], color=f"C{i}", ms=5,
                    label=f"batch {r['batch']}")
        ax.axvline(1, color="k", lw=.8)
        ax.set(title=f"{key[0].removeprefix('convnext_')}, {key[1]}", yticks=range(len(labels)),
               yticklabels=labels, ylim=(len(labels) - .5, -.5))
        ax.set_xlim(0, 1.05 * ax.get_xlim()[1])
        ax.grid(alpha=.3)
    axes[0][0].legend(fontsize=8)
    fig.supxlabel("speed, in that of the fastest peer", fontsize=10)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def read_options():
    parser = make_parser(__doc__, "deploy")
    add = parser.add_argument
    add("--models", nargs="+", default=["convnext_tiny"])
    add("--size", type=int, default=224)
    add("--batches", nargs="+", type=int, default=[1, 8])
    add("--threads", nargs="+", type=int, default=[len(os.sched_getaffinity(0))])
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=60, help="in each setting no round begins after these")
    add("--burst", type=float, default=.4, help="seconds of a network's turn")
    add("--more", action="store_true", help="keep the settings that the result already has")
    return parser.parse_args()


def main():
    a = read_options()
    name, where, rows = a.name or "deploy_cpu", environment("cpu"), []
    origin = {k: where[k] for k in ("command", "commit")}  # a file may hold several runs
    config = dict(size=a.size, burst=a.burst, onnxruntime=onnxruntime.__version__,
                  openvino=openvino.__version__, timm=timm.__version__)
    path = result_path(name)
    if a.more and path.exists(): rows = json.loads(path.read_text())["settings"]
    for model in a.models:
        with tempfile.TemporaryDirectory() as folder:
            write_files(a, model, Path(folder))
            for dtype, threads in itertools.product(a.dtypes, a.threads):
                with ExitStack() as stack:
                    workers = start_workers(stack, a, Path(folder), model, dtype, threads)
                    for batch in a.batches:
                        key = dict(model=model, dtype=dtype, threads=threads, batch=batch)
                        row = key | origin | measure(a, workers, batch)
                        rows = [r for r in rows if {k: r[k] for k in key} != key] + [row]
                        write_result(name, **where, config=config, settings=rows)
                        speeds = (f"{k} {1 / n['ratio']:.2f}" for k, n in row["networks"].items())
                        print(f"{key}: {row['fastest_peer']} = 1; {'; '.join(speeds)}", flush=True)
    draw(rows, result_path(name, ".png"))
    print(RESULTS / name)


if __name__ == "__main__": main()
