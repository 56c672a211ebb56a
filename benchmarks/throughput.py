"""How fast a ConvNeXt is, beside its peers: forward and training step, in one process, round by round.

    python benchmarks/throughput.py                                        convnext_tiny at 224, both memory formats
    python benchmarks/throughput.py --model convnext_atto --image_size 32 --batch_size 128
    python benchmarks/throughput.py --compile --dtypes float32 bfloat16    compiled; dtypes, formats and modes are crossed

Peers: timm, with its MLP of Linears and with 1x1 convolutions (`conv_mlp`); torchvision, for the sizes that it has; and the layout of Meta's
code, written from its description. A round runs every network once, in a random order; a ratio is the median over rounds of the peer's
time over ours in the same round, with the 95% interval of that median (bootstrap). A training step is forward, cross-entropy, backward and AdamW.
Writes benchmarks/results/<name>.json and <name>.png.
"""
import argparse
import gc
import itertools
import random
import statistics
import time

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
import torchvision
from common import RESULTS, environment, interval, write
from torch import nn

from convnext_nb.blocks import ConvNeXtBlock, LayerNorm2d
from convnext_nb.data import pick_device
from convnext_nb.model import count_macs, count_params, create_model

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", default="convnext_tiny")
ap.add_argument("--image_size", type=int, default=224)
ap.add_argument("--batch_size", type=int, help="default: 4 on a CPU, 128 on a GPU")
ap.add_argument("--rounds", type=int, default=25)
ap.add_argument("--formats", nargs="+", default=["contiguous", "channels_last"], choices=["contiguous", "channels_last"], help="memory formats")
ap.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="bfloat16: autocast")
ap.add_argument("--modes", nargs="+", default=["forward", "training step"], choices=["forward", "training step"])
ap.add_argument("--compile", action="store_true", help="measure under torch.compile, not eager")
ap.add_argument("--device")
ap.add_argument("--name", help="of the result; default: throughput_<device>[_compiled]")


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class MetaNorm(LayerNorm2d):
    "LayerNorm over the channels written out, as Meta's code has it for its channels-first maps."
    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class MetaBlock(ConvNeXtBlock):
    "The block in the order of Meta's code: every step an operation of its own, the linears torch's."
    def forward(self, x):
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = F.linear(self.mlp.act(F.linear(y, self.mlp.fc1.weight, self.mlp.fc1.bias)), self.mlp.fc2.weight, self.mlp.fc2.bias)
        return x + self.drop_path((self.gamma * y).permute(0, 3, 1, 2))


def meta_layout(name):
    "Our network with Meta's norms and blocks in place of ours."
    net = create_model(name)
    for m in net.modules():
        if type(m) is LayerNorm2d: m.__class__ = MetaNorm
        if type(m) is ConvNeXtBlock: m.__class__ = MetaBlock
    return net


def networks(name):
    "The same network from each origin, by label."
    nets = {"ours": create_model(name), "timm": timm.create_model(name, conv_mlp=False), "timm, conv_mlp": timm.create_model(name, conv_mlp=True)}
    if hasattr(torchvision.models, name): nets["torchvision"] = getattr(torchvision.models, name)(stochastic_depth_prob=0.)
    if "v2" not in name: nets["Meta's layout"] = meta_layout(name)
    assert len({count_params(n) for n in nets.values()}) == 1
    return nets


def measure(a, device, dtype, fmt, mode):
    "Times of every network under one setting."
    nets = {k: n.to(device, memory_format=FORMATS[fmt]).train(mode != "forward") for k, n in networks(a.model).items()}
    x = torch.randn(a.batch_size, 3, a.image_size, a.image_size, device=device).to(memory_format=FORMATS[fmt])
    labels = torch.randint(1000, (a.batch_size,), device=device)
    optimizers = {k: torch.optim.AdamW(n.parameters(), lr=1e-4) for k, n in nets.items()} if mode != "forward" else {}
    runs = {k: torch.compile(n) if a.compile else n for k, n in nets.items()}

    def once(k):
        with torch.inference_mode(mode == "forward"), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = runs[k](x)
            if mode != "forward": loss = F.cross_entropy(out, labels)
        if mode != "forward":
            loss.backward()
            optimizers[k].step()
            optimizers[k].zero_grad()
        if device.type == "cuda": torch.cuda.synchronize()

    seconds, memory = {k: [] for k in runs}, {}
    for k in runs:
        for _ in range(3): once(k)  # compiles, allocates, tunes
        if device.type == "cuda":
            state = [t for s in optimizers[k].state.values() for t in s.values()] if optimizers else []
            others = torch.cuda.memory_allocated() - sum(t.nbytes for t in [*nets[k].parameters(), *state, x, labels])
            torch.cuda.reset_peak_memory_stats()
            once(k)
            memory[k] = torch.cuda.max_memory_allocated() - others
    order = random.Random(0)
    for r in range(a.rounds):
        for k in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            once(k)
            seconds[k].append(time.perf_counter() - start)
    rows = {k: dict(images_per_s=a.batch_size / statistics.median(t), **interval([p / o for p, o in zip(t, seconds["ours"])]),
                    **({"peak_bytes": memory[k]} if memory else {})) for k, t in seconds.items()}
    fastest = min((k for k in rows if k != "ours"), key=lambda k: rows[k]["ratio"])
    print(f"{mode}, {dtype}, {fmt}, {'compiled' if a.compile else 'eager'}: ours {rows['ours']['images_per_s']:.1f} images/s; "
          + "; ".join(f"{k} {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for k, r in rows.items() if k != "ours"), flush=True)
    return dict(mode=mode, dtype=dtype, memory_format=fmt, fastest_peer=fastest, networks=rows)


def plot(a, settings, path):
    "One group of bars for each setting: speed relative to the first peer, timm."
    labels = list(settings[0]["networks"])
    fig, ax = plt.subplots(figsize=(1.6 + 1.7 * len(settings), 3.4), layout="constrained")
    for i, k in enumerate(labels):
        speeds = [s["networks"][k]["images_per_s"] / s["networks"]["timm"]["images_per_s"] for s in settings]
        ax.bar([g + (i - (len(labels) - 1) / 2) * .16 for g in range(len(settings))], speeds, .15, label=k)
    ax.axhline(1, color="k", lw=.6)
    ax.set_xticks(range(len(settings)), [f"{s['mode']}\n{s['memory_format']}\n{s['dtype']}" for s in settings], fontsize=8)
    ax.set(title=f"{a.model} at {a.image_size}, batch {a.batch_size}, {'compiled' if a.compile else 'eager'}", ylabel="images/s, timm = 1")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)


def main():
    a = ap.parse_args()
    device = pick_device(a.device)
    a.batch_size = a.batch_size or (128 if device.type == "cuda" else 4)
    name, where = a.name or f"throughput_{device.type}{'_compiled' * a.compile}", environment(device)
    config = {k: v for k, v in vars(a).items() if k not in ("name", "device")} | dict(timm=timm.__version__, macs=count_macs(create_model(a.model), (3, a.image_size, a.image_size)))
    settings = []
    for dtype, fmt, mode in itertools.product(a.dtypes, a.formats, a.modes):
        torch.manual_seed(0)
        settings.append(measure(a, device, dtype, fmt, mode))
        torch.compiler.reset()
        gc.collect()
        path = write(name, **where, config=config, settings=settings)  # after each setting: an interrupted benchmark keeps what it has
    plot(a, settings, RESULTS / f"{name}.png")
    print(path)


if __name__ == "__main__": main()
