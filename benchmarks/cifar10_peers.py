r"""CIFAR-10 against the clock: our presets beside plain ConvNets and a ResNet-18, in equal time.

    python benchmarks/cifar10_peers.py --data_dir TREE [--budgets .5 1.9] [--seeds 3]
    python benchmarks/cifar10_peers.py --data_dir TREE --networks ConvNeXt "plain ConvNet"

- ConvNeXt: our presets, see OURS.
- plain ConvNet: the network and the training of airbench94, written anew from Jordan 2024
  (arXiv 2404.00498, sections 2 and 3) and, for Muon's rates, from its author's later recipe:
  a whitened 2x2 convolution, three groups of two 3x3 convolutions with BatchNorm, GELU and
  max-pooling, 64, 256 and 256 wide; batches of 1,000.
- narrow ConvNet: the same, half as wide: 33 million multiply-adds an image, ours has 26.
- ResNet-18: torchvision's with a 3x3 stem and no max-pooling (He et al. 2016, as is usual for
  32x32 images); SGD with Nesterov's momentum, weight decay 5e-4, one cycle up to .1.

A budget is the time that the plain ConvNet takes for so many passes over the 50,000 training
images on this machine: .5, 1.9 and 8 (its own recipe). How many steps of each network fit is
measured first, in turns, and by each run for those after it. Every network trains with every budget
and seed, in a random order, and is tested once, at the end, plain and with our six views of equal
weight. Each network has the crops and flips of its recipe. `operations` in the result says where
the time of a step goes. Runs that the result already holds, of this machine and precision and of
the presets as they are, are not done again, and their budgets stand. Writes <name>.json and
<name>.png into benchmarks/results.
"""
import math
import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import common
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from common import Steps, interleaved, make_parser, result_path
from torch import nn
from torch.profiler import ProfilerActivity, profile

from convnext_nb.accelerate import accelerate, keep_freed_memory
from convnext_nb.data import DataConfig, MemoryLoader, load_splits, pick_device
from convnext_nb.model import count_macs, count_params
from convnext_nb.train import (
    PRESETS,
    Run,
    build_model,
    evaluate,
    orthogonalize,
    preset,
    train_step,
)

OURS = {.5: "cifar10-fast", 1.9: "cifar10-fast", 8: "cifar10"}  # budget -> preset
NAMES = ["ConvNeXt", "plain ConvNet", "narrow ConvNet", "ResNet-18"]


class Group(nn.Module):
    "Two 3x3 convolutions of the plain ConvNet, the first with max-pooling."
    def __init__(self, dim, out):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(d, out, 3, padding=1, bias=False) for d in (dim, out))
        # .4 of the running statistics is new in every step; no scale
        self.norms = nn.ModuleList(nn.BatchNorm2d(out, 1e-12, momentum=.4) for _ in range(2))
        for conv in self.convs: nn.init.dirac_(conv.weight.data[:conv.in_channels])
        for norm in self.norms: norm.weight.requires_grad = False

    def forward(self, x):
        x = F.max_pool2d(self.convs[0](x), 2)
        x = F.gelu(self.norms[0](x))
        return F.gelu(self.norms[1](self.convs[1](x)))


class PlainConvNet(nn.Module):
    "The network of airbench94: (N, 3, 32, 32) -> (N, 10)."
    def __init__(self, images, widths):  # some training images, to whiten
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.groups = nn.Sequential(*(Group(*pair) for pair in pairwise([24, *widths])))
        self.fc = nn.Linear(widths[-1], 10, bias=False)
        self.fc.weight.data.div_(self.fc.weight.std())
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)  # (n, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.data.copy_(torch.cat([filters, -filters]))
        self.whiten.weight.requires_grad = False

    def forward(self, x):
        x = self.groups(F.gelu(self.whiten(x)))
        return self.fc(F.max_pool2d(x, 3).flatten(1)) / 256


class NormalizedMuon:
    "Muon on filters whose norm is set to the square root of their number before each step."
    def __init__(self, filters, lr=.24, momentum=.6):
        self.filters, self.lr, self.momentum = filters, lr, momentum
        self.buffers = [torch.zeros_like(p) for p in filters]

    @torch.no_grad()
    def step(self, left):
        for p, b in zip(self.filters, self.buffers):
            b.mul_(self.momentum).add_(p.grad)
            ahead = p.grad.add(b, alpha=self.momentum)
            p.mul_(len(p) ** .5 / p.norm())
            step = orthogonalize(ahead.reshape(1, len(p), -1), steps=3)
            p.sub_(step.view(p.shape), alpha=self.lr * left)


class Plain:
    "The plain ConvNet, and how it learns: Muon on filters, SGD on the rest, rates to zero."
    data = dict(batch_size=1000, max_shift=2, alternate_flip=True)
    widths = 64, 256, 256

    def __init__(self, images, steps, epoch_steps, device):
        self.model, self.steps = PlainConvNet(images, self.widths).to(device), steps
        self.model.to(memory_format=torch.channels_last)
        named, decay = dict(self.model.named_parameters()), 2e-6 * self.data["batch_size"]
        biases = [p for n, p in named.items() if ".norms." in n and p.requires_grad]
        parts = [([self.model.whiten.bias], .053, min(3 * epoch_steps, steps)),
                 (biases, .053, steps), ([self.model.fc.weight], .67, steps)]
        self.sgd = torch.optim.SGD(
            [dict(params=p, lr=lr, weight_decay=decay / lr, peak=lr, end=end)
             for p, lr, end in parts], momentum=.85, nesterov=True)
        self.muon = NormalizedMuon([p for n, p in named.items() if ".convs." in n])

    def step(self, i, x, y):
        with self.autocast():
            loss = F.cross_entropy(self.model(x), y, label_smoothing=.2, reduction="sum")
        loss.backward()
        for g in self.sgd.param_groups: g["lr"] = g["peak"] * max(0, 1 - i / g["end"])
        self.sgd.step()
        self.muon.step(1 - i / self.steps)
        self.model.zero_grad()


class Narrow(Plain): widths = 32, 128, 128


class ResNet18:
    "ResNet-18 for small images, and its usual recipe."
    data = dict(batch_size=128, max_shift=4)

    def __init__(self, images, steps, epoch_steps, device):
        self.model = torchvision.models.resnet18(num_classes=10)
        self.model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.model.maxpool = nn.Identity()
        self.model.to(device, memory_format=torch.channels_last)
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=.1, momentum=.9, nesterov=True,
                                   weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.sgd, .1, total_steps=steps + 1)

    def step(self, i, x, y):
        with self.autocast(): loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.sgd.step()
        self.schedule.step()
        self.model.zero_grad()


class Ours:
    "A preset of ours, its epochs stretched or shortened to the steps that there are."
    def __init__(self, cfg, info, steps, device):
        warmup = cfg.warmup_epochs and cfg.warmup_epochs / cfg.epochs
        cfg = replace(cfg, epochs=1, warmup_epochs=warmup, low_res_epochs=0)
        model = build_model(cfg, info).to(device)
        self.run = Run(cfg, info, steps, device, accelerate(model) if cfg.accelerate else model)
        self.model = self.run.eval_model
        self.run.model.train()

    def step(self, i, x, y):
        train_step(self.run, x, y)
        self.run.batch += 1


class Race:
    "What all networks share: the images, the device, the precision."
    def __init__(self, a):
        self.device = pick_device(a.device)
        self.dtype = common.amp_dtype(a, self.device)
        self.largest_batch = a.largest_batch
        where = dict(dataset="imagefolder", data_dir=a.data_dir) if a.data_dir else {}
        cfg = DataConfig(**dict(dataset="cifar10") | where)
        splits, self.info = load_splits(cfg)
        self.train, self.test = ((torch.from_numpy(x), y) for x, y in
                                 (splits["train"], splits["test"]))

    def loader(self, cfg, train=True):
        images, labels = self.train if train else self.test
        cfg = replace(cfg, batch_size=min(cfg.batch_size, self.largest_batch, len(labels)))
        return MemoryLoader(images, labels, self.info, cfg, train)

    def recipe(self, name, budget):
        "What a run must share with one that was done before, as JSON has it."
        ours = PRESETS[OURS[budget]] if name == "ConvNeXt" else None
        return dict(preset=ours, device=common.environment(self.device)["device"],
                    amp_dtype=self.dtype, largest_batch=self.largest_batch)

    def start(self, name, budget, steps, seed):
        "A network with fresh weights, and its loader."
        torch.manual_seed(seed)
        device = dict(device=self.device.type, seed=seed)
        if name == "ConvNeXt":
            cfg = preset(OURS[budget], amp_dtype=self.dtype, **device)
            return Ours(cfg, self.info, steps, self.device), self.loader(cfg)
        kind = dict(zip(NAMES[1:], (Plain, Narrow, ResNet18)))[name]
        loader = self.loader(DataConfig(**kind.data, **device))
        plain_views = DataConfig(batch_size=5000, augment=False, **device)
        sample = next(iter(self.loader(plain_views)))[0]
        return kind(sample, steps, len(loader), self.device), loader

    def run(self, network, loader, steps):
        "Train; the seconds that it took, data included."
        network.autocast = partial(common.autocast, self.device, getattr(torch, self.dtype))
        def learn():
            for i, (x, y) in enumerate(Steps(loader, steps)):
                network.step(i, x.to(memory_format=torch.channels_last), y)
        return common.seconds_of(self.device, learn)


def images_per_s(race, networks, budgets, images, rounds=3):
    "Of each network and budget: the median over rounds of so many images, in turns."
    names = [(name, b) for name in networks for b in budgets
             if name == "ConvNeXt" or b == budgets[0]]
    rates = {name: [] for name in names}
    for done, (name, b) in interleaved(names, rounds + 1):
        network, loader = race.start(name, b, 100, seed=0)
        steps = max(1, images // loader.cfg.batch_size)
        seconds = race.run(network, loader, steps)
        if done: rates[name, b].append(steps * loader.cfg.batch_size / seconds)
    median = {k: statistics.median(v) for k, v in rates.items()}
    return {(name, b): median.get((name, b), median.get((name, budgets[0])))
            for name in networks for b in budgets}


def operations(race, name, budget, steps=3, shown=12):
    "Share of the time of training steps that each operation takes itself, the longest first."
    network, loader = race.start(name, budget, 100, seed=0)
    cuda = race.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    race.run(network, loader, 2)
    with profile(activities=activities) as prof: race.run(network, loader, steps)
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total
             for e in prof.key_averages()}
    longest = sorted(times, key=times.get, reverse=True)[:shown]
    return {k: times[k] / sum(times.values()) for k in longest}


def train_and_test(race, name, budget, seed, seconds, rate):
    "One run: as many steps as fit, and the test at their end."
    batch_size = race.start(name, budget, 1, seed)[1].cfg.batch_size
    steps = max(1, round(seconds * rate / batch_size))
    network, loader = race.start(name, budget, steps, seed)
    taken = race.run(network, loader, steps)
    test_dl = race.loader(replace(loader.cfg, batch_size=500), train=False)
    dtype = getattr(torch, race.dtype)
    plain, views = (evaluate(network.model, test_dl, dtype, tta=t)["top1"] for t in (False, True))
    macs, images = count_macs(network.model, (3, 32, 32)), steps * batch_size
    return dict(
        network=name, budget=budget, seed=seed, steps=steps, batch_size=batch_size,
        epochs=images / len(race.train[1]), seconds=taken, wanted_seconds=seconds,
        images_per_s=images / taken, gmacs=macs / 1e9, gflops_per_s=6 * macs * images / taken / 1e9,
        params=count_params(network.model), test_top1=plain, test_top1_tta=views,
        recipe=race.recipe(name, budget))


def summarize(runs):
    "Of each network and budget: mean and spread over the seeds."
    summary = []
    for name, budget in dict.fromkeys((r["network"], r["budget"]) for r in runs):
        rows = [r for r in runs if (r["network"], r["budget"]) == (name, budget)]
        mean = {k: statistics.mean(r[k] for r in rows) for k in (
            "test_top1", "test_top1_tta", "seconds", "epochs", "images_per_s", "gflops_per_s")}
        top1 = [r["test_top1"] for r in rows]
        summary.append(dict(network=name, budget=budget, seeds=len(rows), **mean,
                            spread=max(top1) - min(top1), gmacs=rows[0]["gmacs"]))
    return summary


def draw(runs, path):
    """Test accuracy over minutes of training: a point for each run, a line through the means. The
    axis is the logarithm of the error."""
    fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for i, name in enumerate(NAMES):
        mine = [r for r in runs if r["network"] == name]
        if not mine: continue
        rows = sorted(summarize(mine), key=lambda s: s["seconds"])
        minutes = [s["seconds"] / 60 for s in rows]
        ax.plot(minutes, [1 - s["test_top1_tta"] for s in rows], "o-", color=f"C{i}",
                label=f"{name}, {rows[0]['gmacs'] * 1e3:.0f} million multiply-adds")
        ax.plot(minutes, [1 - s["test_top1"] for s in rows], "o:", mfc="none", color=f"C{i}")
        for key in ("test_top1", "test_top1_tta"):
            ax.plot([r["seconds"] / 60 for r in mine], [1 - r[key] for r in mine], ".",
                    ms=4, color=f"C{i}")
    ax.set_yscale("log")
    errors = [1 - r[key] for r in runs for key in ("test_top1", "test_top1_tta")]
    ticks = [e for e in (.9, .7, .5, .3, .2, .14, .1, .08, .06, .05, .04, .03, .02, .01)
             if min(errors) / 1.2 < e < max(errors) * 1.2]
    ax.set_yticks(ticks, [f"{1 - e:.0%}" for e in ticks])
    ax.minorticks_off()
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.1 * ax.get_xlim()[1]), xlabel="minutes of training", ylabel="test accuracy",
           title="CIFAR-10 from scratch; hollow: without test-time augmentation")
    ax.grid(alpha=.3)
    ax.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=110)


def read_options():
    parser = make_parser(__doc__, "cifar10_peers")
    add = parser.add_argument
    add("--data_dir", help="imagefolder tree; without it torchvision downloads into ./data")
    add("--budgets", nargs="+", type=float, choices=list(OURS), default=list(OURS))
    add("--seeds", type=int, default=3, help="number of seeds, from 0")
    add("--networks", nargs="+", choices=NAMES, default=NAMES, help="that train")
    add("--probe", type=int, default=2000, help="images in a round of measuring speed")
    add("--largest_batch", type=int, default=10000, help="cut larger ones, to try the script")
    add("--minutes", type=float, default=math.inf, help="begin no run after so many")
    add("--amp_dtype", help="of all networks (default: bfloat16 if it is fast, else float32)")
    return parser.parse_args()


def main():
    a = read_options()
    keep_freed_memory()
    race = Race(a)
    name = a.name or f"cifar10_peers_{race.device.type}"
    where = common.environment(race.device, a.data_dir)
    end, old = time.monotonic() + 60 * a.minutes, common.read_result(name)
    runs = [r for r in old.get("runs", [])
            if r["recipe"] == race.recipe(r["network"], r["budget"])]
    needed = [n for n in NAMES if n in a.networks or n == "plain ConvNet"]  # it sets the time
    rates = images_per_s(race, needed, a.budgets, a.probe)
    print("images/s:", {f"{n}, {b}": round(r) for (n, b), r in rates.items()}, flush=True)
    shares = old["operations"] if runs else {}
    shares |= {n: operations(race, n, a.budgets[0]) for n in needed}
    def write(): common.write_result(
        name, **where, summary=summarize(runs), runs=runs, operations=shares)
    done = {(r["network"], r["budget"], r["seed"]) for r in runs}
    for budget in sorted(a.budgets):
        seconds = next((r["wanted_seconds"] for r in runs if r["budget"] == budget),
                       budget * len(race.train[1]) / rates["plain ConvNet", budget])
        for seed, network in interleaved(a.networks, a.seeds):
            if (network, budget, seed) in done or time.monotonic() > end: continue
            # in a long run a network's rate may be another than in a short one
            known = [r["images_per_s"] for r in runs if r["network"] == network]
            rate = statistics.median(known) if known else rates[network, budget]
            r = train_and_test(race, network, budget, seed, seconds, rate)
            runs.append(r | dict(commit=where["commit"]))
            write()
            print(f"{network}, {budget:g}, seed {seed}: {r['epochs']:.1f} epochs in "
                  f"{r['seconds']:.0f} s, test {r['test_top1']:.2%}, with six views "
                  f"{r['test_top1_tta']:.2%}", flush=True)
    if runs:
        write()
        draw(runs, result_path(name, ".png"))
    print(result_path(name))


if __name__ == "__main__": main()
