r"""The paper's figure 2 at small scale: every rung from ResNet-50 to ConvNeXt-T, narrowed, trained
on CIFAR-10 with one recipe and several seeds.

    python benchmarks/ladder.py --data_dir TREE     a CPU: 1/4 of the width, 1/3 of the blocks
    python benchmarks/ladder.py --data_dir TREE --scale .5 --depth 1 \
        --fraction 1 --epochs 20                    a GPU
    python benchmarks/ladder.py --speed             images per second of each rung in full, at 224

A stem of 2x2 patches (or, before that rung, 7x7 and a max-pool, with half the strides) suits 32x32
images. Accuracy is that on 5,000 training images held out for validation; the test images are not
read. Runs that the result already holds are not done again: what was stopped goes on.

Speed: in each round every rung does one forward pass and one training step (cross-entropy,
backward, AdamW), in a random order; its ratio is the median over rounds of the first rung's time
over its own in the same round. Both write <name>.json into benchmarks/results, and the ablation
<name>.png.
"""
import math
import statistics

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import (
    amp_dtype,
    autocast,
    environment,
    interleaved,
    make_parser,
    median_ratio,
    result_path,
    run_study,
    seconds_of,
    train_on_cifar10,
    write_result,
)

from convnext_nb.data import pick_device
from convnext_nb.model import count_macs, count_params
from convnext_nb.modernize import LADDER, design, gmacs, modernize, parent_rung
from convnext_nb.train import TrainConfig, evaluate

RECIPE = dict(optimizer="adamw", ema_decay=0.)  # no EMA: it would not hold BatchNorm's statistics
FIRST_TRAINED = 1  # rung 0 differs from rung 1 by the recipe alone
MODES = ("forward", "training step")


def depths_of(rung, depth):
    "Blocks in each stage of a rung, times `depth`; at least one."
    return tuple(max(1, round(depth * d)) for d in design(rung).depths)


def train_one(rung, seed, a):
    "Train the network of a rung; its validation accuracy and its cost."
    cfg = TrainConfig(
        **RECIPE, batch_size=a.batch_size, lr=a.lr, epochs=a.epochs, seed=seed, device=a.device,
        amp_dtype=a.amp_dtype, cuda_graph=a.device != "cpu")
    torch.manual_seed(seed)
    model = modernize(rung, a.scale, num_classes=10, patch_size=2, depths=depths_of(rung, a.depth))
    run, val_dl, seconds = train_on_cifar10(cfg, a.data_dir, a.fraction, model)
    return dict(rung=rung, seed=seed, val_top1=evaluate(run.model, val_dl, run.dtype)["top1"],
                macs=count_macs(model, (3, 32, 32)), params=count_params(model), seconds=seconds)


def describe(r):
    "A line on a run."
    return (f"seed {r['seed']}  {r['rung']:24} {r['val_top1']:.2%}  "
            f"{r['macs'] / 1e6:6.2f} M MACs  {r['seconds']:5.0f} s")


def summarize(runs):
    """Mean and spread of each rung over its seeds, and the difference from the rung that it stands
    on over the seeds that both have, beside the paper's."""
    top1 = {r.name: {} for r in LADDER}  # by rung and seed
    for r in runs: top1[r["rung"]][r["seed"]] = r["val_top1"]
    summary = []
    for i, rung in enumerate(LADDER):
        mine = top1[rung.name]
        if not mine: continue
        base = LADDER[parent_rung(i)]
        deltas = [mine[s] - top1[base.name][s] for s in mine if s in top1[base.name]]
        cost = next(r for r in runs if r["rung"] == rung.name)
        summary.append(dict(
            rung=rung.name, seeds=len(mine), val_top1=statistics.mean(mine.values()),
            spread=max(mine.values()) - min(mine.values()), base=base.name,
            delta=statistics.mean(deltas) if deltas else None, deltas=deltas,
            paper_top1=rung.top1, paper_delta=rung.top1 - base.top1,
            macs=cost["macs"], params=cost["params"]))
    return summary


def draw(summary, runs, path):
    """The paper's figure 2 from our runs: a point for each seed and a bar for the mean; what was
    tried and not kept is pale."""
    kept, top1 = {r.name: r.kept for r in LADDER}, [100 * r["val_top1"] for r in runs]
    fig, ax = plt.subplots(figsize=(8, 5.4), layout="constrained")
    for i, s in enumerate(summary):
        ax.barh(i, 100 * s["val_top1"], color="C0", alpha=.55 if kept[s["rung"]] else .2)
        points = [100 * r["val_top1"] for r in runs if r["rung"] == s["rung"]]
        ax.plot(points, [i] * len(points), "k.", ms=4)
    ax.axvline(100 * summary[0]["val_top1"], color="k", lw=.8)
    ax.set_yticks(range(len(summary)), [s["rung"] for s in summary])
    ax.invert_yaxis()
    ax.set(xlim=(min(top1) - 3, max(top1) + 2),
           xlabel="accuracy on held-out images of CIFAR-10, %")
    ax.grid(alpha=.3, axis="x")
    fig.savefig(path, dpi=110)


class Racer:
    "The network of a rung, and its two ways to run on one batch."
    def __init__(self, rung, a, x, y, dtype):
        net = modernize(rung, a.scale, depths=depths_of(rung, a.depth))
        self.net = net.to(x.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)
        self.x, self.y, self.dtype = x, y, dtype

    def step(self, mode):
        forward = mode == "forward"
        with torch.inference_mode(forward), autocast(self.x.device, self.dtype):
            logits = self.net(self.x)
        if forward: return
        F.cross_entropy(logits.float(), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, mode):
        self.net.train(mode != "forward")
        return seconds_of(self.x.device, self.step, mode)


def race(a, device, dtype):
    "Seconds of every rung in both modes, in every round; two rounds warm up."
    x = torch.randn(a.batch_size, 3, a.image_size, a.image_size, device=device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(1000, (a.batch_size,), device=device)
    rungs = [r.name for i, r in enumerate(LADDER) if i != FIRST_TRAINED]  # it is rung 0's network
    racers = {name: Racer(name, a, x, y, dtype) for name in rungs}
    seconds = {(name, mode): [] for name in rungs for mode in MODES}
    for name, mode in seconds:
        for _ in range(2): racers[name].seconds(mode)
    for _, (name, mode) in interleaved(list(seconds), a.rounds, 60 * a.minutes, least=1):
        seconds[name, mode].append(racers[name].seconds(mode))
    return seconds


def measure_speed(a, device):
    "Images per second of every rung, forward and training step, and their ratio to the first's."
    seconds, rows = race(a, device, getattr(torch, a.amp_dtype)), []
    for (rung, mode), mine in seconds.items():
        first = seconds[LADDER[0].name, mode]
        rows.append(dict(
            rung=rung, mode=mode, images_per_s=a.batch_size / statistics.median(mine),
            gmacs=gmacs(rung, scale=a.scale, depths=depths_of(rung, a.depth)),
            **median_ratio([f / m for f, m in zip(first, mine)])))
    for r in rows:
        print(f"{r['mode']:14} {r['rung']:24} {r['images_per_s']:8.1f} images/s  "
              f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]")
    config = dict(image_size=a.image_size, batch_size=a.batch_size, dtype=a.amp_dtype,
                  memory_format="channels_last", rounds=len(mine), scale=a.scale, depth=a.depth)
    return write_result(a.name, **environment(device), config=config, settings=rows)


def train_ladder(a):
    "Train every rung with every seed; summary and picture."
    settings = dict(scale=a.scale, depth=a.depth, fraction=a.fraction, epochs=a.epochs,
                    batch_size=a.batch_size, lr=a.lr, amp_dtype=a.amp_dtype, recipe=RECIPE)
    names = [r.name for r in LADDER[FIRST_TRAINED:] if not a.only or r.name in a.only]
    wanted = [(name, seed) for seed in range(a.seeds) for name in names]
    runs = run_study(a, a.name, settings, ("rung", "seed"), wanted, train_one, summarize, describe)
    if runs: draw(summarize(runs), runs, result_path(a.name, ".png"))
    return result_path(a.name)


def read_options():
    parser = make_parser(__doc__, "ladder_<device>, or ladder_speed")
    add = parser.add_argument
    add("--data_dir", help="imagefolder tree; without it torchvision downloads into ./data")
    add("--scale", type=float, help="factor on the width (default: .25; with --speed 1)")
    add("--depth", type=float, help="factor on the depths (default: 1/3; with --speed 1)")
    add("--fraction", type=float, default=.4, help="share of the training images (default: .4)")
    add("--epochs", type=int, default=2)
    add("--batch_size", type=int,
        help="default: 64; with --speed 4 on a CPU, 128 on a GPU")
    add("--lr", type=float, default=4e-3)
    add("--seeds", type=int, default=3, help="number of seeds, from 0")
    add("--only", nargs="+", help="only these rungs, by name")
    add("--minutes", type=float, default=math.inf,
        help="begin no run, and no further round, after so many")
    add("--amp_dtype", help="default: bfloat16 if it is fast, else float32")
    add("--speed", action="store_true", help="measure images per second; no data are needed")
    add("--image_size", type=int, default=224, help="with --speed")
    add("--rounds", type=int, default=15, help="with --speed")
    return parser.parse_args()


def main():
    a = read_options()
    device = pick_device(a.device)
    a.device, a.amp_dtype = device.type, amp_dtype(a, device)
    batch_size = 64 if not a.speed else 128 if device.type == "cuda" else 4
    defaults = dict(
        scale=1. if a.speed else .25, depth=1. if a.speed else 1 / 3, batch_size=batch_size,
        name=f"ladder_speed_{device.type}" if a.speed else f"ladder_{device.type}")
    for k, v in defaults.items():
        if getattr(a, k) is None: setattr(a, k, v)
    print(measure_speed(a, device) if a.speed else train_ladder(a))


if __name__ == "__main__": main()
