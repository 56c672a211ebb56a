"""CIFAR-10 from scratch: our presets, with several seeds, and the stock network in the same time.

    python benchmarks/cifar10.py --data_dir TREE                                     all three presets (a GPU)
    python benchmarks/cifar10.py --data_dir TREE --presets cifar10-fast --stock --epochs 5 --batch_size 128 --dims 48,96,192    a CPU

All 50,000 training images train (`--val_fraction 0`: no epoch is chosen); the 10,000 test images are looked at once, at the end, plain and
with test-time augmentation. The presets were chosen on images held out of the training set: cifar10_study.py. `--stock` trains the stock
convnext_atto (4x4 stem, the paper's start, AdamW) too, for as many whole epochs as fit in the time that the preset took; `--compiled` trains
the last seed once more under torch.compile. Without --data_dir, torchvision downloads CIFAR-10. Further options are convnext-train's.
Runs that the result already holds are not done again. Writes benchmarks/results/<name>.json, <name>.png and <name>_errors.png.
"""
import argparse
import csv
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import RESULTS, environment, write

from convnext_nb.data import pick_device
from convnext_nb.train import PRESETS, TrainConfig, evaluate_run, make_parser, preset, train

STOCK = dict(model="convnext_atto", patch_size=4, ls_init_value=1e-6, init_std=.02, batch_size=128, lr=4e-3, ema_decay=0.)  # as in cifar10_study.py
PLACE = ("data_dir", "out", "resume", "dataset")


def one(cfg, label, errors):
    "Train, and look at the test images; the picture of what went wrong goes to `errors`."
    cuda = torch.device(cfg.device).type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter()
    result = train(cfg)
    total = time.perf_counter() - clock
    peak = torch.cuda.max_memory_allocated() if cuda else None
    tta = evaluate_run(cfg.out, tta=True, device=cfg.device)["top1"]
    shutil.copy(Path(cfg.out) / "errors.png", errors)
    history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader((Path(cfg.out) / "history.csv").open())]
    config = json.loads(json.dumps({k: v for k, v in asdict(cfg).items() if k not in PLACE}))
    return dict(label=label, config=config, result=result, test_top1_tta=tta, total_seconds=total, peak_memory=peak, history=history)


def summarize(runs):
    "Mean and spread over seeds for each label; seconds are those of the training steps, total_seconds those of the whole call."
    summary = {}
    for label in dict.fromkeys(r["label"] for r in runs):
        rows = [r for r in runs if r["label"] == label]
        numbers = dict(test_top1=[r["result"]["test_top1"] for r in rows], test_top1_tta=[r["test_top1_tta"] for r in rows])
        means = {k: statistics.mean(v) for k, v in numbers.items()} | {f"{k}_std": statistics.stdev(v) if len(v) > 1 else None for k, v in numbers.items()}
        summary[label] = means | dict(seeds=len(rows), epochs=rows[0]["config"]["epochs"], seconds=statistics.median(r["result"]["seconds"] for r in rows),
                                      total_seconds=statistics.median(r["total_seconds"] for r in rows), peak_memory=rows[0]["peak_memory"])
    return summary


def draw(runs, path):
    "Training accuracy over seconds, and what the test said."
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    summary = summarize(runs)
    for r in runs:
        seconds, spent = [], 0.
        for h in r["history"]: seconds.append(spent := spent + h["seconds"])
        c, s = f"C{list(summary).index(r['label'])}", summary[r["label"]]
        told = f"{r['label']}: test {s['test_top1']:.2%}, with augmentation {s['test_top1_tta']:.2%}"
        ax.plot(seconds, [h["train_top1"] for h in r["history"]], "o-", ms=3, color=c, alpha=.8, label=None if told in ax.get_legend_handles_labels()[1] else told)
    ax.set(xlabel="seconds of training", ylabel="training accuracy (augmented)", title="ConvNeXt from scratch on CIFAR-10")
    ax.grid(alpha=.3)
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument("--data_dir", help="imagefolder tree, train/ and test/")
    ap.add_argument("--presets", nargs="+", choices=[p for p in PRESETS if p.startswith("cifar10")], default=[p for p in PRESETS if p.startswith("cifar10")])
    ap.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    ap.add_argument("--stock", action="store_true", help="the stock network too, for the same time")
    ap.add_argument("--compiled", action="store_true", help="the last seed once more, under torch.compile")
    ap.add_argument("--minutes", type=float, default=1e9, help="begin no run that would end later, as far as one can tell")
    ap.add_argument("--device")
    ap.add_argument("--name", help="of the result; default: cifar10_<device>")
    a, more = ap.parse_known_args()
    given = vars(make_parser().parse_args(more))
    given.pop("preset")
    device, begun = pick_device(a.device), time.monotonic()
    name = a.name or f"cifar10_{device.type}"
    where, path, scratch = environment(device), RESULTS / f"{name}.json", tempfile.TemporaryDirectory()
    if a.data_dir: where["command"] = where["command"].replace(a.data_dir, "TREE")
    data = dict(dataset="imagefolder", data_dir=a.data_dir) if a.data_dir else dict(dataset="cifar10")
    runs = json.loads(path.read_text()).get("runs", []) if path.exists() else []
    runs = [r for r in runs if "label" in r]

    def go(cfg, label):
        "The run, done now or before; None: there is no time for it."
        config = json.loads(json.dumps({k: v for k, v in asdict(cfg).items() if k not in PLACE}))
        for r in runs:
            if (r["label"], r["config"]) == (label, config): return r
        last = max((r["total_seconds"] for r in runs if r["label"] == label), default=0)
        if time.monotonic() - begun + last > 60 * a.minutes: return print(f"no time left for {label}, seed {cfg.seed}")
        runs[:] = [r for r in runs if r["label"] != label or {**r["config"], "seed": 0} == {**config, "seed": 0}]  # of another recipe
        print(f"{label}, seed {cfg.seed}", flush=True)
        r = one(replace(cfg, out=str(Path(scratch.name) / f"{len(runs)}-{cfg.seed}-{time.monotonic_ns()}")), label, RESULTS / f"{name}_errors.png")
        runs.append(r | dict(commit=where["commit"]))
        write(name, **where, summary=summarize(runs), runs=runs)  # after each run: what is stopped keeps what it has
        print(f"{label}, seed {cfg.seed}: test {r['result']['test_top1']:.2%}, with augmentation {r['test_top1_tta']:.2%}, {r['result']['seconds']:.1f} s", flush=True)
        return r

    for seed in range(a.seeds):
        for p in a.presets:  # interleaved: what the machine does meanwhile, it does to all
            cfg = preset(p, **data | dict(val_fraction=0., seed=seed, device=device.type) | given)
            ours = go(cfg, p)
            if ours and a.compiled and seed == a.seeds - 1: go(replace(cfg, compile=True), f"{p}, compiled")
            if not ours or not a.stock: continue
            stock = TrainConfig(**STOCK, **data, val_fraction=0., seed=seed, device=device.type, amp_dtype=cfg.amp_dtype, cuda_graph=cfg.cuda_graph)
            label = f"stock, in the time of {p}"
            epochs = next((r["config"]["epochs"] for r in runs if r["label"] == label), None)
            if epochs is None:  # how long does one epoch take?
                probe = train(replace(stock, epochs=1, out=str(Path(scratch.name) / f"probe-{p}")))
                epochs = max(1, round(ours["result"]["seconds"] / probe["seconds"]))
            go(replace(stock, epochs=epochs), label)
    if runs: draw(runs, RESULTS / f"{name}.png")
    print(path)


if __name__ == "__main__": main()
