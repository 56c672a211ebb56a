"""The paper's figure 2 at small scale: every rung from ResNet-50 to ConvNeXt-T, narrowed, trained on CIFAR-10 with one recipe and several seeds.

    python benchmarks/ladder.py --data_dir TREE                                              a CPU: a quarter of the width, a third of the blocks
    python benchmarks/ladder.py --data_dir TREE --scale .5 --depth 1 --fraction 1 --epochs 20   a GPU
    python benchmarks/ladder.py --speed                                                      images per second of each rung in full, at 224

A stem of 2x2 patches (or, before that rung, 7x7 and a max-pool, with half the strides) suits 32x32 images. Accuracy is that on 5,000 training images held out for validation; the test images are not read. Runs that the result already holds are
not done again: what was stopped goes on. Speed: in each round every rung does one forward pass and one training step (cross-entropy, backward,
AdamW), in a random order; its ratio is the median over rounds of the first rung's time over its own in the same round. Both write
benchmarks/results/<name>.json, and the ablation <name>.png.
"""
import argparse
import random
import statistics
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import RESULTS, environment, fit, interval, pursue, write

from convnext_nb.data import pick_device
from convnext_nb.model import count_macs, count_params
from convnext_nb.modernize import LADDER, before, design, gmacs, modernize
from convnext_nb.train import TrainConfig, evaluate

RECIPE = dict(optimizer="adamw", ema_decay=0.)  # no average of weights: it would not hold BatchNorm's statistics
START = 1  # the first rung that is trained: rung 0 differs from it by the recipe alone


def one(name, seed, a):
    "Train the network of a rung; its validation accuracy and its cost."
    cfg = TrainConfig(**RECIPE, batch_size=a.batch_size, lr=a.lr, epochs=a.epochs, seed=seed, device=a.device, amp_dtype=a.amp_dtype, cuda_graph=a.device != "cpu")
    torch.manual_seed(seed)
    depths = tuple(round(a.depth * d) for d in design(name).depths)
    model = modernize(name, a.scale, num_classes=10, patch_size=2, depths=depths)
    run, val_dl, seconds = fit(cfg, a.data_dir, a.fraction, model)
    return dict(rung=name, seed=seed, val_top1=evaluate(run.model, val_dl, run.dtype)["top1"],
                macs=count_macs(model, (3, 32, 32)), params=count_params(model), seconds=seconds)


def summarize(runs):
    "By rung: mean and spread, and the difference from the rung that it stands on over the seeds that both have, beside the paper's."
    found, summary = {(r["rung"], r["seed"]): r for r in runs}, []
    for i, rung in enumerate(LADDER):
        rows = [r for r in runs if r["rung"] == rung.name]
        if not rows: continue
        base = LADDER[before(i)]
        deltas = [r["val_top1"] - found[base.name, r["seed"]]["val_top1"] for r in rows if (base.name, r["seed"]) in found]
        top1 = [r["val_top1"] for r in rows]
        summary.append(dict(rung=rung.name, seeds=len(rows), val_top1=statistics.mean(top1), spread=max(top1) - min(top1), base=base.name,
                            delta=statistics.mean(deltas) if deltas else None, deltas=deltas, paper_top1=rung.top1,
                            paper_delta=rung.top1 - base.top1, macs=rows[0]["macs"], params=rows[0]["params"]))
    return summary


def draw(summary, runs, path):
    "The paper's figure 2 from our runs: a point for each seed and a bar for the mean; what was tried and not kept is pale."
    kept = {r.name: r.kept for r in LADDER}
    fig, ax = plt.subplots(figsize=(8, 5.4), layout="constrained")
    for i, s in enumerate(summary):
        ax.barh(i, 100 * s["val_top1"], color="C0", alpha=.55 if kept[s["rung"]] else .2)
        ax.plot([100 * r["val_top1"] for r in runs if r["rung"] == s["rung"]], [i] * s["seeds"], "k.", ms=4)
    ax.axvline(100 * summary[0]["val_top1"], color="k", lw=.8)
    ax.set_yticks(range(len(summary)), [s["rung"] for s in summary])
    ax.invert_yaxis()
    ax.set(xlim=(100 * min(r["val_top1"] for r in runs) - 3, 100 * max(r["val_top1"] for r in runs) + 2), xlabel="accuracy on held-out images of CIFAR-10, %")
    ax.grid(alpha=.3, axis="x")
    fig.savefig(path, dpi=110)


def speed(a, device):
    "Images per second of every rung, forward and training step, and their ratio to the first rung's."
    fmt, dtype = dict(memory_format=torch.channels_last), getattr(torch, a.amp_dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    size = a.batch_size or (128 if device.type == "cuda" else 4)
    x, y = torch.randn(size, 3, a.image_size, a.image_size, device=device).to(**fmt), torch.randint(1000, (size,), device=device)
    names = [r.name for i, r in enumerate(LADDER) if i != START]  # the recipe changes no network
    def once(name, mode):
        net = nets[name].train(mode != "forward")
        if device.type == "cuda": torch.cuda.synchronize()
        clock = time.perf_counter()
        with torch.inference_mode(mode == "forward"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32): out = net(x)
        if mode != "forward":
            F.cross_entropy(out.float(), y).backward()
            optimizers[name].step(), optimizers[name].zero_grad()
        if device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter() - clock

    nets = {n: modernize(n).to(device, **fmt) for n in names}
    optimizers = {n: torch.optim.AdamW(net.parameters(), lr=1e-4) for n, net in nets.items()}
    cells, order, end = [(n, m) for n in names for m in ("forward", "training step")], random.Random(0), time.monotonic() + 60 * a.minutes
    for cell in cells: once(*cell), once(*cell)
    rounds = []
    while len(rounds) < a.rounds and time.monotonic() < end: rounds.append({c: once(*c) for c in order.sample(cells, len(cells))})
    rows = [dict(rung=n, mode=m, images_per_s=size / statistics.median(r[n, m] for r in rounds), gmacs=gmacs(n),
                 **interval([r[names[0], m] / r[n, m] for r in rounds])) for n, m in cells]
    for r in rows: print(f"{r['mode']:14} {r['rung']:24} {r['images_per_s']:8.1f} images/s  {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]")
    config = dict(image_size=a.image_size, batch_size=size, dtype=str(dtype).removeprefix("torch."), memory_format="channels_last", rounds=len(rounds))
    return write(a.name or f"ladder_speed_{device.type}", **environment(device), config=config, settings=rows)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data_dir", help="imagefolder tree; without it torchvision downloads into ./data")
    ap.add_argument("--scale", type=float, default=.25, help="factor on the width (default: .25)")
    ap.add_argument("--depth", type=float, default=1 / 3, help="factor on the depths (default: 1/3)")
    ap.add_argument("--fraction", type=float, default=.4, help="share of the training images (default: .4)")
    ap.add_argument("--epochs", type=int, default=2)
    ap.add_argument("--batch_size", type=int, help="default: 64; with --speed 4 on a CPU, 128 on a GPU")
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    ap.add_argument("--only", nargs="+", help="only these rungs, by name")
    ap.add_argument("--minutes", type=float, default=1e9, help="begin no run, and no round, after so many")
    ap.add_argument("--amp_dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    ap.add_argument("--speed", action="store_true", help="measure images per second; no data are needed")
    ap.add_argument("--image_size", type=int, default=224, help="with --speed")
    ap.add_argument("--rounds", type=int, default=15, help="with --speed")
    ap.add_argument("--device")
    ap.add_argument("--name", help="of the result; default: ladder_<device>, ladder_speed_<device>")
    a = ap.parse_args()
    device = pick_device(a.device)
    if a.speed: return print(speed(a, device))
    a.device, a.batch_size, name = device.type, a.batch_size or 64, a.name or f"ladder_{device.type}"
    names = [r.name for r in LADDER[START:] if not a.only or r.name in a.only]
    how = dict(scale=a.scale, depth=a.depth, fraction=a.fraction, epochs=a.epochs, batch_size=a.batch_size, lr=a.lr, amp_dtype=a.amp_dtype, recipe=RECIPE)
    def tell(r): return f"seed {r['seed']}  {r['rung']:24} {r['val_top1']:.2%}  {r['macs'] / 1e6:6.2f} M MACs  {r['seconds']:5.0f} s"
    runs = pursue(a, name, how, ("rung", "seed"), [(n, s) for s in range(a.seeds) for n in names], one, summarize, tell)
    if runs: draw(summarize(runs), runs, RESULTS / f"{name}.png")
    print(RESULTS / f"{name}.json")


if __name__ == "__main__": main()
