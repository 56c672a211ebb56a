"""CIFAR-10 from scratch: convnext_atto with a 2x2 stem, and the same network with the stock 4x4 stem, for the same epochs.

    python benchmarks/cifar10.py                             downloads CIFAR-10 (torchvision)
    python benchmarks/cifar10.py --data_dir TREE             takes it from an imagefolder tree, train/ and test/

All 50,000 training images train (`--val_fraction 0`: no epoch is chosen), the 10,000 test images are looked at once, at the end.
The recipe was chosen on a validation split of 5,000 training images. Writes benchmarks/results/<name>.json and <name>.png.
"""
import argparse
import csv
import shutil
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
from common import RESULTS, environment, write

from convnext_nb.data import pick_device
from convnext_nb.train import TrainConfig, train

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--data_dir", help="imagefolder tree; without it torchvision downloads into ./data")
ap.add_argument("--epochs", type=int, default=4)
ap.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
ap.add_argument("--patch_sizes", type=int, nargs="+", default=[2, 4])
ap.add_argument("--device")
ap.add_argument("--name", help="of the result; default: cifar10_<device>")
a = ap.parse_args()



def summarize(runs):
    "Mean test accuracy, its spread over seeds, and median seconds, for each patch size."
    summary = {}
    for p in sorted({r["config"]["patch_size"] for r in runs}):
        results = [r["result"] for r in runs if r["config"]["patch_size"] == p]
        top1 = [r["test_top1"] for r in results]
        summary[f"patch_size={p}"] = dict(test_top1=statistics.mean(top1), spread=statistics.stdev(top1) if len(top1) > 1 else None,
                                          seeds=len(top1), seconds=statistics.median(r["seconds"] for r in results))
    return summary


device = pick_device(a.device)
name = a.name or f"cifar10_{device.type}"
data = dict(dataset="imagefolder", data_dir=a.data_dir) if a.data_dir else dict(dataset="cifar10")
runs, folder, where = [], Path(tempfile.mkdtemp()), environment(device)
if a.data_dir: where["command"] = where["command"].replace(a.data_dir, "TREE")
for seed in range(a.seeds):
    for patch_size in a.patch_sizes:  # interleaved: what the machine does meanwhile, it does to both
        cfg = TrainConfig(**data, model="convnext_atto", patch_size=patch_size, batch_size=128, epochs=a.epochs, warmup_epochs=a.epochs / 4,
                          lr=4e-3, val_fraction=0, seed=seed, device=str(device), out=str(folder / f"p{patch_size}s{seed}"))
        print(f"patch_size {patch_size}, seed {seed}", flush=True)
        result = train(cfg)
        history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader((Path(cfg.out) / "history.csv").open())]
        config = {k: v for k, v in asdict(cfg).items() if k not in ("data_dir", "out", "resume")}
        runs.append(dict(config=config, result=result, history=history))
        path = write(name, **where, summary=summarize(runs), runs=runs)  # after each run: an interrupted benchmark keeps what it has
        print(f"patch_size {patch_size}, seed {seed}: test {result['test_top1']:.2%}", flush=True)

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for r in runs:
    p = r["config"]["patch_size"]
    ax.plot([h["epoch"] for h in r["history"]], [h["train_top1"] for h in r["history"]], "o-", color=f"C{a.patch_sizes.index(p)}", alpha=.8,
            label=f"{p}x{p} stem: test {r['result']['test_top1']:.1%}, {r['result']['seconds'] / 60:.1f} min")
ax.set(xlabel="epoch", ylabel="training accuracy (augmented)", title="convnext_atto from scratch on CIFAR-10")
ax.grid(alpha=.3)
ax.legend(fontsize=8)
fig.savefig(RESULTS / f"{name}.png", dpi=110)
print(path)
shutil.rmtree(folder)
