"""How fast a ConvNeXt is, beside its peers and beside the hardware: forward and training step, in one process, round by round.

    python benchmarks/throughput.py                                        convnext_tiny at 224, both memory formats
    python benchmarks/throughput.py --model convnext_atto --image_size 32 --batch_size 128
    python benchmarks/throughput.py --codes eager compiled --dtypes float32 bfloat16    codes, dtypes, formats and modes are crossed

Peers: timm, with its MLP of Linears and with 1x1 convolutions (`conv_mlp`); torchvision, for the sizes that it has; Hugging Face, where transformers
is installed; and the layout of Meta's code, written from its description. Beside them stands our network after `accelerate`. A round runs every
network once, in a random order; a ratio is the median over rounds of the peer's time over ours in the same round, with the 95% interval of that
median (bootstrap). A training step is forward, cross-entropy, backward and AdamW. A network that fails, of memory for one, is named in `failed`.

The floor is the least time that an image can take on this device: each operation lasts as long as its FLOPs at the rate of a large matrix product, or
its bytes at the rate of a large copy, whichever is longer. Both rates are measured in the same run. `floor_fraction` is floor over time.
Writes benchmarks/results/<name>.json after each setting, and <name>.png.
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
from torch.utils.flop_counter import FlopCounterMode

from convnext_nb.blocks import ConvNeXtBlock, Downsample, LayerNorm2d, Stem
from convnext_nb.data import pick_device
from convnext_nb.model import VARIANTS, count_macs, count_params, create_model

try: import transformers
except ImportError: transformers = None
try: from convnext_nb.kernels import accelerate
except ImportError: accelerate = None  # no Triton

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", default="convnext_tiny")
ap.add_argument("--image_size", type=int, default=224)
ap.add_argument("--batch_size", type=int, help="default: 4 on a CPU, 256 on a GPU")
ap.add_argument("--rounds", type=int, default=25, help="in each setting")
ap.add_argument("--seconds", type=float, default=30, help="no further round of a setting begins after these, once three are done")
ap.add_argument("--codes", nargs="+", default=["eager"], choices=["eager", "compiled"], help="compiled: torch.compile on the whole network")
ap.add_argument("--formats", nargs="+", default=["contiguous", "channels_last"], choices=["contiguous", "channels_last"], help="memory formats")
ap.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="bfloat16: autocast")
ap.add_argument("--modes", nargs="+", default=["forward", "training step"], choices=["forward", "training step"])
ap.add_argument("--device")
ap.add_argument("--name", help="of the result; default: throughput_<device>")


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


class Logits(nn.Module):
    "A network of Hugging Face that takes images and returns logits, as the others do."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net(pixel_values=x).logits


def hugging_face(name):
    "The variant `name` in transformers, with fresh weights."
    v, family = VARIANTS[name], "ConvNextV2" if "v2" in name else "ConvNext"
    config = getattr(transformers, f"{family}Config")(depths=list(v["depths"]), hidden_sizes=list(v["dims"]), num_labels=1000)
    return Logits(getattr(transformers, f"{family}ForImageClassification")(config))


def networks(name):
    "The same network from each origin, by label."
    nets = {"ours": create_model(name)}
    if accelerate: nets["ours, accelerated"] = create_model(name)
    nets |= {"timm": timm.create_model(name, conv_mlp=False), "timm, conv_mlp": timm.create_model(name, conv_mlp=True)}
    if hasattr(torchvision.models, name): nets["torchvision"] = getattr(torchvision.models, name)(stochastic_depth_prob=0.)
    if transformers: nets["Hugging Face"] = hugging_face(name)
    if "v2" not in name: nets["Meta's layout"] = meta_layout(name)
    assert len({count_params(n) for n in nets.values()}) == 1
    return nets


def fastest(f, device, repeats=10):
    "Least seconds that `f` takes."
    def once():
        start = time.perf_counter()
        f()
        if device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter() - start
    return min(once() for _ in range(repeats))


def peaks(device, dtypes):
    "FLOP/s of a large matrix product in each dtype, bytes/s of a large copy (read and written)."
    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    rates = {}
    for dtype in dtypes:
        m, out = torch.randn(n, n, device=device).to(getattr(torch, dtype)), torch.empty(n, n, device=device, dtype=getattr(torch, dtype))
        rates[dtype] = 2 * n**3 / fastest(lambda: torch.mm(m, m, out=out), device)
    source, target = torch.ones(size, dtype=torch.uint8, device=device), torch.zeros(size, dtype=torch.uint8, device=device)
    return dict(flops_per_s=rates, bytes_per_s=2 * size / fastest(lambda: target.copy_(source), device))


# What a block does at least, in order: depthwise convolutions, matrix products of its MLP, passes over maps of its width; elementwise steps ride along.
FORWARD = [(1, 0, 2), (0, 1, 5), (0, 1, 6)]                                       # convolution + norm, fc1 + GELU, fc2 + gamma + shortcut
BACKWARD = [(0, 0, 3), (0, 1, 9), (0, 1, 5), (0, 1, 5), (0, 1, 5),                # gamma, and its input kept forward; fc2 and GELU; fc1
            (0, 0, 3), (1, 0, 3), (1, 0, 2)]                                      # norm; convolution + shortcut, its weights
OPERATIONS = {"forward": FORWARD, "training step": FORWARD + BACKWARD}            # 13 and 48 passes


def work(name, image_size):
    "FLOPs forward, numbers in, numbers out of the stem, each downsampling, block and the classifier, for one image."
    with torch.device("meta"): net, image = create_model(name), torch.empty(1, 3, image_size, image_size)
    rows = []
    def after(m, inputs, out): rows.append((m, counter.get_total_flops() - sum(r[1] for r in rows), inputs[0].numel(), out.numel()))
    for m in net.modules():
        if isinstance(m, (Stem, Downsample, ConvNeXtBlock)) or m is net.head.fc: m.register_forward_hook(after)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(image)
    return rows


def floor_us(name, image_size, mode, itemsize, flops_per_s, bytes_per_s):
    "Microseconds that an image needs at least: operation by operation, bound by arithmetic or by memory. GRN and AdamW are not counted."
    def seconds(flops, numbers): return max(flops / flops_per_s, numbers * itemsize / bytes_per_s)
    total = 0
    for m, flops, inputs, outputs in work(name, image_size):
        if isinstance(m, ConvNeXtBlock):
            conv = 2 * outputs * m.conv_dw.weight[0].numel()
            total += sum(seconds(c * conv + p * (flops - conv) / 2, passes * outputs) for c, p, passes in OPERATIONS[mode])
        else: total += seconds(flops, inputs + outputs) * (1 if mode == "forward" else 3)  # the gradients to inputs and to weights cost the same
    return 1e6 * total


def measure(a, device, code, dtype, fmt, mode, floor):
    "Times of every network under one setting, and the networks that failed."
    setting, failed = dict(mode=mode, dtype=dtype, memory_format=fmt, code=code), []
    nets = {k: n.to(device, memory_format=FORMATS[fmt]).train(mode != "forward") for k, n in networks(a.model).items()}
    x = torch.randn(a.batch_size, 3, a.image_size, a.image_size, device=device).to(memory_format=FORMATS[fmt])
    labels = torch.randint(1000, (a.batch_size,), device=device)
    optimizers, runs = {}, {}

    def once(k):
        with torch.inference_mode(mode == "forward"), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = runs[k](x)
            if mode != "forward": loss = F.cross_entropy(out, labels)
        if mode != "forward":
            loss.backward()
            optimizers[k].step()
            optimizers[k].zero_grad()
        if device.type == "cuda": torch.cuda.synchronize()

    def prepare(k):
        "Compile, allocate, tune; peak memory of this network alone."
        if k == "ours, accelerated":
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"): accelerate(nets[k], x)
        if mode != "forward": optimizers[k] = torch.optim.AdamW(nets[k].parameters(), lr=1e-4)
        runs[k] = torch.compile(nets[k]) if code == "compiled" else nets[k]
        for _ in range(2): once(k)
        if device.type != "cuda": return {}
        state = [t for s in optimizers[k].state.values() for t in s.values()] if optimizers else []
        others = torch.cuda.memory_allocated() - sum(t.nbytes for t in [*nets[k].parameters(), *state, x, labels])
        torch.cuda.reset_peak_memory_stats()
        once(k)
        return dict(peak_bytes=torch.cuda.max_memory_allocated() - others)

    memory = {}
    for k in list(nets):
        try: memory[k] = prepare(k)
        except (RuntimeError, ValueError) as e: failed.append(setting | dict(network=k, error=(str(e).strip() or type(e).__name__).splitlines()[0]))
        if k in memory: continue
        for d in (nets, runs, optimizers): d.pop(k, None)
        gc.collect()
        if device.type == "cuda": torch.cuda.empty_cache()
        print(f"{mode}, {dtype}, {fmt}, {code}: {k} failed: {failed[-1]['error']}", flush=True)
    if "ours" not in nets: return None, failed
    seconds, order, end = {k: [] for k in runs}, random.Random(0), time.perf_counter() + a.seconds
    while (done := len(seconds["ours"])) < a.rounds and (done < 3 or time.perf_counter() < end):
        for k in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            once(k)
            seconds[k].append(time.perf_counter() - start)
    speed = {k: a.batch_size / statistics.median(t) for k, t in seconds.items()}
    rows = {k: dict(images_per_s=speed[k], **interval([p / o for p, o in zip(t, seconds["ours"])]), floor_fraction=speed[k] * floor / 1e6, **memory[k])
            for k, t in seconds.items()}
    nearest = min((k for k in rows if not k.startswith("ours")), key=lambda k: rows[k]["ratio"], default=None)
    print(f"{mode}, {dtype}, {fmt}, {code}: ours {speed['ours']:.1f} images/s; "
          + "; ".join(f"{k} {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for k, r in rows.items() if k != "ours"), flush=True)
    return setting | dict(rounds=len(seconds["ours"]), floor_us=floor, fastest_peer=nearest, networks=rows), failed


def table(settings):
    "The share of the floor's speed that each network reaches, one line a setting."
    labels = list(dict.fromkeys(k for s in settings for k in s["networks"]))
    lines = [["", "floor, us an image", *labels]]
    for s in settings:
        fractions = [f"{s['networks'][k]['floor_fraction']:.1%}" if k in s["networks"] else "failed" for k in labels]
        lines.append([f"{s['mode']}, {s['dtype']}, {s['memory_format']}, {s['code']}", f"{s['floor_us']:,.1f}", *fractions])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in lines)


MARKS = {"ours": ("o", "C0"), "ours, accelerated": ("D", "C3"), "timm": ("s", "C1"), "timm, conv_mlp": ("^", "C2"), "torchvision": ("v", "C4"),
         "Hugging Face": ("P", "C5"), "Meta's layout": ("X", "C7")}


def plot(a, where, settings, path):
    "A panel for each mode, a row for each setting, a mark for each network: images a second."
    row = lambda s: f"{s['dtype']}, {s['memory_format']}, {s['code']}"
    rows, modes = list(dict.fromkeys(map(row, settings))), list(dict.fromkeys(s["mode"] for s in settings))
    labels = list(dict.fromkeys(k for s in settings for k in s["networks"]))
    fig, axs = plt.subplots(1, len(modes), figsize=(2.2 + 4.4 * len(modes), 1.6 + .36 * len(rows)), layout="constrained", sharey=True, squeeze=False)
    for ax, mode in zip(axs[0], modes):
        for k in labels:
            shown, (marker, colour), ours = [s for s in settings if s["mode"] == mode and k in s["networks"]], MARKS.get(k, ("*", "k")), k.startswith("ours")
            ax.plot([s["networks"][k]["images_per_s"] for s in shown], [rows.index(row(s)) for s in shown], marker, color=colour, ms=9 if ours else 6,
                    mec="k" if ours else "none", zorder=2 + ours, label=k)
        ax.set(xlim=(0, None), ylim=(len(rows) - .5, -.5), xlabel=f"{mode}, images/s", yticks=range(len(rows)), yticklabels=rows)
        ax.grid(alpha=.3)
    fig.suptitle(f"{a.model} at {a.image_size}, batch {a.batch_size}, {where['device']}", fontsize=11)
    fig.legend(*axs[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    a = ap.parse_args()
    device = pick_device(a.device)
    a.batch_size = a.batch_size or (256 if device.type == "cuda" else 4)
    name, where, hardware = a.name or f"throughput_{device.type}", environment(device), peaks(device, a.dtypes)
    for label, there in {"Hugging Face (transformers is not installed)": transformers, "ours, accelerated (convnext_nb.kernels needs Triton)": accelerate}.items():
        if not there: print(f"left out: {label}")
    print("; ".join(f"{d} {r / 1e12:.3g} TFLOP/s" for d, r in hardware["flops_per_s"].items()) + f"; {hardware['bytes_per_s'] / 1e9:,.3g} GB/s", flush=True)
    config = {k: v for k, v in vars(a).items() if k not in ("name", "device")}
    config |= dict(timm=timm.__version__, transformers=transformers and transformers.__version__, macs=count_macs(create_model(a.model), (3, a.image_size, a.image_size)))
    settings, failed = [], []
    for code, dtype, fmt, mode in itertools.product(a.codes, a.dtypes, a.formats, a.modes):
        torch.manual_seed(0)
        floor = floor_us(a.model, a.image_size, mode, getattr(torch, dtype).itemsize, hardware["flops_per_s"][dtype], hardware["bytes_per_s"])
        try: done, without = measure(a, device, code, dtype, fmt, mode, floor)
        except torch.OutOfMemoryError as e: done, without = None, [dict(mode=mode, dtype=dtype, memory_format=fmt, code=code, network="all", error=str(e).splitlines()[0])]
        settings += [done] if done else []
        failed += without
        torch.compiler.reset()
        gc.collect()
        path = write(name, **where, config=config, peaks=hardware, settings=settings, failed=failed)  # after each setting: what is interrupted keeps what it has
    if not settings: raise SystemExit(f"throughput.py: error: our network ran under no setting; {failed[-1]['network']}: {failed[-1]['error']}")
    plot(a, where, settings, RESULTS / f"{name}.png")
    print(table(settings), path, sep="\n")


if __name__ == "__main__": main()
