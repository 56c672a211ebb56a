"What every result says about where it comes from, and what several benchmarks do."
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from itertools import chain, count, islice
from multiprocessing import get_context
from pathlib import Path

import torch
import torchvision

import convnext_nb
from convnext_nb.data import DataConfig, MemoryLoader, hold_out, load_splits, stratified_split
from convnext_nb.pretrained import atomic_write
from convnext_nb.train import Run, _fast_bfloat16, fit

RESULTS = Path(__file__).parent / "results"


def make_parser(doc, result, **options) -> ArgumentParser:
    "A parser with the options that every benchmark has; `result` is the stem of its results."
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter, **options)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--name", help=f"of the result (default: {result}_<device>)")
    return parser


def cpu_name():
    "Name of the processor, and its family and model where the system tells."
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: lines = []
    # a cloud's "AMD EPYC" may be any of several
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = facts.get("model name", platform.processor())
    if "cpu family" not in facts: return name
    return f"{name}, family {facts['cpu family']}, model {facts['model']}"


def git(*args):
    "What git says about this checkout."
    done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS)
    return done.stdout.strip()


def environment(device, data_dir=None) -> dict:
    "Machine, versions, commit and command of this process; the folder of the data is TREE."
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    others = ":(top)", ":(top,exclude)benchmarks/results"  # a run before may have written there
    changes = "+changes" if git("status", "--porcelain", "--", *others) else ""
    cuda = torch.device(device).type == "cuda"
    return dict(
        command=command.replace(data_dir, "TREE") if data_dir else command,
        commit=git("rev-parse", "--short", "HEAD") + changes,
        device=torch.cuda.get_device_name(device) if cuda else cpu_name(),
        cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(),
        python=platform.python_version(), torch=torch.__version__,
        torchvision=torchvision.__version__, convnext_nb=convnext_nb.__version__)


def result_path(name, ending=".json") -> Path:
    "benchmarks/results/<name><ending>"
    return RESULTS / f"{name}{ending}"


def read_result(name) -> dict:
    "The result of that name; empty if there is none yet."
    path = result_path(name)
    return json.loads(path.read_text()) if path.exists() else {}


def write_result(name, **result) -> Path:
    "Write the result as JSON, whole or not at all."
    path, text = result_path(name), json.dumps(result, indent=1) + "\n"
    atomic_write(path, lambda tmp: tmp.write_text(text))
    return path


def amp_dtype(a, device):
    "Name of the precision that --amp_dtype names, else of the one that training has by default."
    return a.amp_dtype or ("bfloat16" if _fast_bfloat16(device) else "float32")


def autocast(device, dtype):
    "torch.autocast to `dtype`; float32: none."
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def seconds_of(device, f, *args):
    "Seconds that `f(*args)` takes, the device's work included."
    if device.type == "cuda": torch.cuda.synchronize()
    start = time.perf_counter()
    f(*args)
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(names, rounds, seconds=math.inf, least=3):
    """Pairs of round and name: every name in every round, in a random order, so that what the
    machine does meanwhile, it does to all. After `seconds` no further round begins, once `least`
    are done."""
    order, end = random.Random(0), time.monotonic() + seconds
    for done in range(rounds):
        if done >= least and time.monotonic() >= end: return
        for name in order.sample(names, len(names)): yield done, name


def median_ratio(ratios, draws=2000):
    "Median of the ratios of all rounds, and the 95% interval of that median, by bootstrap."
    rng = random.Random(0)
    samples = (rng.choices(ratios, k=len(ratios)) for _ in range(draws))
    medians = sorted(map(statistics.median, samples))
    low, high = medians[int(.025 * draws)], medians[int(.975 * draws)]
    return dict(ratio=statistics.median(ratios), low=low, high=high)


@cache
def cifar10_splits(data_dir, fraction):
    "Images and labels to train on, the 5,000 held out of the training images, and the facts."
    cfg = DataConfig("imagefolder" if data_dir else "cifar10", data_dir or "data", seed=0)
    splits, info = load_splits(cfg)
    splits = hold_out(splits, cfg)  # the same for every seed of a run
    images, labels = splits["train"]
    if fraction < 1:
        kept, _ = stratified_split(labels, 1 - fraction, 0)
        images, labels = images[kept], labels[kept]
    return (images, labels), splits["val"], info


def train_on_cifar10(cfg, data_dir, fraction, model=None, prepare=lambda run: None):
    """Train on that share of the images, after `prepare(run)`: the run, the loader of the images
    held out, the seconds."""
    (images, labels), (val_images, val_labels), info = cifar10_splits(data_dir, fraction)
    train_dl = MemoryLoader(torch.from_numpy(images), labels, info, cfg, train=True)
    val_cfg = replace(cfg, batch_size=min(500, len(val_labels)))
    val_dl = MemoryLoader(torch.from_numpy(val_images), val_labels, info, val_cfg)
    run = Run(cfg, info, len(train_dl), torch.device(cfg.device), model)
    prepare(run)
    start = time.perf_counter()
    fit(run, train_dl)
    return run, val_dl, time.perf_counter() - start


class Steps:
    "A training loader as one epoch of so many steps, over as many passes as they take."
    def __init__(self, loader, steps):
        self.loader, self.steps, self.info = loader, steps, loader.info
        if not len(loader): raise ValueError("a batch is larger than the data set")

    def set_epoch(self, epoch, start=0): pass  # there is one

    def __iter__(self):
        batches = chain.from_iterable(map(self.batches, count()))
        return islice(batches, self.steps)

    def batches(self, epoch):
        self.loader.set_epoch(epoch)
        yield from self.loader


def run_study(a, name, settings, keys, wanted, train_one, summarize, describe):
    """The runs of a study: those that the result holds, if it was made with the same `settings`,
    then `train_one(*item, a)` for every other item of `wanted`. `keys` are the fields of a run
    that make its item; `describe(run)` is the line that is printed when it ends."""
    where, old = environment(a.device, a.data_dir), read_result(name)
    runs = old["runs"] if old.get("how") == settings else []  # another study is begun anew
    done = {tuple(r[k] for k in keys) for r in runs}
    todo = [item for item in wanted if item not in done]
    for r in finished(todo, train_one, a):
        runs.append(r | dict(commit=where["commit"]))
        # after each run: what is stopped keeps what it has
        write_result(name, **where, how=settings, summary=summarize(runs), runs=runs)
        print(describe(r), flush=True)
    print(f"no time left for {len(todo)} runs" if todo else "nothing left to do")
    return runs


def finished(todo, train_one, a):
    """`train_one(*item, a)` for every item, as they end. An item leaves `todo` when it begins, and
    after `a.minutes` none does. On a CPU as many at once as there are cores, unless `a.jobs` says
    how many; they share the cores."""
    cores = len(os.sched_getaffinity(0))
    jobs = getattr(a, "jobs", None) or (cores if a.device == "cpu" else 1)
    end, going, spawn = time.monotonic() + 60 * a.minutes, set(), get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (max(1, cores // jobs),)) as pool:
        while True:
            while todo and len(going) < jobs and time.monotonic() < end:
                going.add(pool.submit(train_one, *todo.pop(0), a))
            if not going: return
            ended, going = wait(going, return_when=FIRST_COMPLETED)
            for future in ended: yield future.result()
