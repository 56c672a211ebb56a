"""What makes a ConvNeXt learn 32x32 images: one change at a time, to the stock network and to
ours, with several seeds.

    python benchmarks/cifar10_study.py --data_dir TREE      a CPU: a quarter of the images, 4 epochs
    python benchmarks/cifar10_study.py --data_dir TREE --fraction 1 --epochs 20     a GPU

Accuracy is that on 5,000 training images held out for validation; the test images are not read.
Runs that the result already holds are not done again: a study that was stopped goes on. Writes
<name>.json and <name>.png into benchmarks/results.
"""
import math
import statistics

import matplotlib.pyplot as plt
from common import make_parser, result_path, run_study, train_on_cifar10

from convnext_nb.data import pick_device
from convnext_nb.model import count_macs, count_params
from convnext_nb.train import TrainConfig, evaluate

SHARED = dict(batch_size=128, lr=4e-3)
STOCK = dict(  # the paper's network and start
    model="convnext_atto", patch_size=4, ls_init_value=1e-6, init_std=.02, ema_decay=0.)
OURS = dict(
    depths="2,4,2", dims="48,96,192", kernel_size=3, patch_size=2, ls_init_value=1.,
    optimizer="muon", lr=8e-3, ema_decay=.99)
STARTS = dict(stock=STOCK, ours=OURS)
# of the stock network, and of ours: each alone; the first of each changes nothing
CHANGES = {
    "stock": {
        "stock: 4x4 stem, 4 stages, 7x7": {},
        "stem 2x2": dict(patch_size=2),
        "stem 1x1, half the channels": dict(patch_size=1, dims="20,40,80,160"),
        "3 stages": dict(depths="2,4,2", dims="48,96,192"),
        "kernels 3x3": dict(kernel_size=3),
        "LayerScale from 1": dict(ls_init_value=1.),
        "first weights 1/sqrt(fan-in)": dict(init_std=None),
        "learning rate 1e-3": dict(lr=1e-3),
        "average of weights, .99": dict(ema_decay=.99),
        "Muon": dict(optimizer="muon"),
        "Muon, learning rate 8e-3": dict(optimizer="muon", lr=8e-3),
        "drop path .1": dict(drop_path_rate=.1),
        "mixup .8 and cutmix 1": dict(mixup=.8, cutmix=1.),
        "cutout 8": dict(cutout=8),
        "alternating flips": dict(alternate_flip=True),
    },
    "ours": {
        "ours: 2x2 stem, 3 stages, 3x3, Muon": {},
        "stem 4x4": dict(patch_size=4),
        "stem 1x1, half the channels": dict(patch_size=1, dims="24,48,96"),
        "4 stages": dict(depths="2,2,6,2", dims="40,80,160,320"),
        "kernels 5x5": dict(kernel_size=5),
        "kernels 7x7": dict(kernel_size=7),
        "LayerScale from 1e-6": dict(ls_init_value=1e-6),
        "no LayerScale": dict(ls_init_value=None),
        "first weights .02": dict(init_std=.02),
        "AdamW, learning rate 4e-3": dict(optimizer="adamw", lr=4e-3),
        "AdamW, learning rate 8e-3": dict(optimizer="adamw"),
        "AdamW, learning rate 2e-3": dict(optimizer="adamw", lr=2e-3),
        "Muon, learning rate 4e-3": dict(lr=4e-3),
        "Muon, learning rate 16e-3": dict(lr=16e-3),
        "no average of weights": dict(ema_decay=0.),
        "drop path .1": dict(drop_path_rate=.1),
        "mixup .8 and cutmix 1": dict(mixup=.8, cutmix=1.),
        "cutout 8": dict(cutout=8),
        "alternating flips": dict(alternate_flip=True),
        "24 pixels in the first half": dict(low_res=24, low_res_epochs="half"),
    },
}


def train_one(start, change, seed, a):
    "Train a network; its cost, and its validation accuracy, plain and with test-time augmentation."
    values = SHARED | STARTS[start] | CHANGES[start][change]
    if values.get("low_res_epochs") == "half": values["low_res_epochs"] = a.epochs // 2
    cfg = TrainConfig(**values, epochs=a.epochs, seed=seed, device=a.device,
                      amp_dtype=a.amp_dtype, cuda_graph=a.device != "cpu")
    run, val_dl, seconds = train_on_cifar10(cfg, a.data_dir, a.fraction)
    plain = evaluate(run.eval_model, val_dl, run.dtype)
    with_tta = evaluate(run.eval_model, val_dl, run.dtype, tta=True)
    info = val_dl.info
    macs = count_macs(run.model, (info.in_chans, info.image_size, info.image_size))
    return dict(start=start, change=change, seed=seed, val_top1=plain["top1"],
                val_top1_tta=with_tta["top1"], seconds=seconds, values=values,
                macs=macs, params=count_params(run.model))


def describe(r):
    "A line on a run."
    return (f"seed {r['seed']}  {r['start']:5}  {r['change']:36} {r['val_top1']:.2%}  "
            f"with test-time augmentation {r['val_top1_tta']:.2%}")


def runs_of(runs, start, change):
    return [r for r in runs if (r["start"], r["change"]) == (start, change)]


def summarize(runs):
    """Mean and spread of each change over its seeds, and its difference from where it starts over
    the seeds that both have."""
    summary = []
    for start, changes in CHANGES.items():
        unchanged = {r["seed"]: r["val_top1"] for r in runs_of(runs, start, next(iter(changes)))}
        for change in changes:
            rows = runs_of(runs, start, change)
            if not rows: continue
            top1 = [r["val_top1"] for r in rows]
            deltas = [r["val_top1"] - unchanged[r["seed"]] for r in rows if r["seed"] in unchanged]
            summary.append(dict(
                start=start, change=change, seeds=len(rows),
                val_top1=statistics.mean(top1), spread=max(top1) - min(top1),
                delta=statistics.mean(deltas) if deltas else None,
                val_top1_tta=statistics.mean(r["val_top1_tta"] for r in rows),
                macs=rows[0]["macs"], params=rows[0]["params"]))
    return summary


def draw(summary, runs, path):
    "A point for each seed and a bar for the mean, for both starts."
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    titles = ("one change to the stock network", "one change to our network")
    for ax, start, title in zip(axes, CHANGES, titles):
        rows = [s for s in summary if s["start"] == start]
        if not rows: continue
        top1, colors = [s["val_top1"] for s in rows], ["C7", *["C0"] * (len(rows) - 1)]
        ax.barh(range(len(rows)), top1, color=colors, alpha=.45)
        for i, s in enumerate(rows):
            points = [r["val_top1"] for r in runs_of(runs, start, s["change"])]
            ax.plot(points, [i] * len(points), "k.", ms=4)
        ax.axvline(top1[0], color="k", lw=.8)
        ax.set_yticks(range(len(rows)), [s["change"] for s in rows])
        ax.invert_yaxis()
        ax.set(xlim=(min(top1) - .05, max(top1) + .02), xlabel="validation accuracy", title=title)
        ax.grid(alpha=.3, axis="x")
    fig.savefig(path, dpi=110)


def read_options():
    parser = make_parser(__doc__, "cifar10_study")
    add = parser.add_argument
    add("--data_dir", help="imagefolder tree; without it torchvision downloads into ./data")
    add("--fraction", type=float, default=.25, help="share of the training images (default: .25)")
    add("--epochs", type=int, default=4)
    add("--seeds", type=int, default=3, help="number of seeds, from 0")
    add("--only", help="only changes whose name has this in it, and where they start")
    add("--minutes", type=float, default=math.inf, help="begin no run after so many")
    add("--amp_dtype", default="bfloat16")
    return parser.parse_args()


def main():
    a = read_options()
    a.device = pick_device(a.device).type
    name = a.name or f"cifar10_study_{a.device}"
    settings = dict(fraction=a.fraction, epochs=a.epochs, amp_dtype=a.amp_dtype,
                    shared=SHARED, stock=STOCK, ours=OURS)
    chosen = [(start, change) for start, changes in CHANGES.items()
              for i, change in enumerate(changes) if not a.only or i == 0 or a.only in change]
    wanted = [(*item, seed) for seed in range(a.seeds) for item in chosen]
    runs = run_study(a, name, settings, ("start", "change", "seed"), wanted, train_one, summarize,
                     describe)
    if runs: draw(summarize(runs), runs, result_path(name, ".png"))
    print(result_path(name))


if __name__ == "__main__": main()
