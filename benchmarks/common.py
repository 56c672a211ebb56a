"What every result says about where it comes from, and what several benchmarks do."
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import torchvision

import convnext_nb
from convnext_nb.data import DataConfig, MemoryLoader, hold_out, pick_device, read_parts, stratified_split
from convnext_nb.train import Run, train_epoch

RESULTS = Path(__file__).parent / "results"


def _cpu():
    "Name of the processor, where the system tells."
    try: return next(l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name"))
    except (OSError, StopIteration): return platform.processor()


def environment(device) -> dict:
    "Machine, versions, commit and command of this process."
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    cuda = torch.device(device).type == "cuda"
    return dict(command=" ".join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
                commit=git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
                device=torch.cuda.get_device_name(device) if cuda else _cpu(), cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(),
                python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, convnext_nb=convnext_nb.__version__)


def write(name: str, **result) -> Path:
    "benchmarks/results/<name>.json"
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def interval(ratios, draws=2000):
    "Median of the ratios and the 95% interval of that median."
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return dict(ratio=statistics.median(ratios), low=medians[int(.025 * draws)], high=medians[int(.975 * draws)])


@cache
def images(data_dir, fraction):
    "CIFAR-10: the part of the training images that is trained on, the 5,000 that are held out, and the facts."
    torch.set_num_threads(1)
    cfg = DataConfig("imagefolder" if data_dir else "cifar10", data_dir or "data", seed=0)  # the same split for every seed of a run
    parts, info = read_parts(cfg)
    parts = hold_out(parts, cfg)
    x, y = parts["train"]
    if fraction < 1: x, y = (t[stratified_split(y, 1 - fraction, 0)[0]] for t in (x, y))
    return (x, y), parts["val"], info


def fit(cfg, data_dir, fraction, model=None):
    "Train on CIFAR-10: the run, the loader of the images held out, and the seconds."
    (x, y), (val_x, val_y), info = images(data_dir, fraction)
    train_dl = MemoryLoader(torch.from_numpy(x), y, info, cfg, train=True)
    val_dl = MemoryLoader(torch.from_numpy(val_x), val_y, info, replace(cfg, batch_size=min(500, len(val_y))))
    run, clock = Run(cfg, info, len(train_dl), pick_device(cfg.device), model), time.perf_counter()
    while run.epoch < cfg.epochs:
        train_epoch(run, train_dl)
        run.epoch, run.batch = run.epoch + 1, 0
    return run, val_dl, time.perf_counter() - clock


def pursue(a, name, how, keys, todo, one, summarize, tell):
    "The runs of a study: those that the result holds, then `one(*item, a)` for the other items of `todo`, each written down when it ends."
    device, end = pick_device(a.device), time.monotonic() + 60 * a.minutes
    a.device, where, path = device.type, environment(device), RESULTS / f"{name}.json"
    if a.data_dir: where["command"] = where["command"].replace(a.data_dir, "TREE")
    old = json.loads(path.read_text()) if path.exists() else {}
    runs = old["runs"] if old.get("how") == how else []  # another study is begun anew
    done = {tuple(r[k] for k in keys) for r in runs}
    todo = [item for item in todo if item not in done]
    jobs = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:  # on a CPU, as many runs at once as there are cores, one thread each
        waiting = set()
        while todo or waiting:
            while todo and len(waiting) < jobs and time.monotonic() < end: waiting.add(pool.submit(one, *todo.pop(0), a))
            if not waiting: break
            first = next(as_completed(waiting))
            waiting.remove(first)
            runs.append(first.result() | dict(commit=where["commit"]))
            write(name, **where, how=how, summary=summarize(runs), runs=runs)  # after each run: what is stopped keeps what it has
            print(tell(runs[-1]), flush=True)
    return runs
