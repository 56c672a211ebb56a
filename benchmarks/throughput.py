"""How fast a ConvNeXt is, beside its peers and beside the hardware: forward and training step, in
one process, round by round.

    python benchmarks/throughput.py                     convnext_tiny at 224, both memory formats
    python benchmarks/throughput.py --model convnext_atto --image_size 32 --batch_size 128
    python benchmarks/throughput.py --codes eager compiled --dtypes float32 bfloat16
                                                codes, dtypes, formats and modes are crossed
    python benchmarks/throughput.py --codes eager graph compiled compiled+graph
                                                a GPU: CUDA graphs of whole steps too

Peers: timm, with its MLP of Linears and with 1x1 convolutions (`conv_mlp`); torchvision, for the
sizes that it has; Hugging Face, where transformers is installed; and the layout of Meta's code,
written from its description. Beside them stands our network after `accelerate`. A round runs every
network once, in a random order; a ratio is the median over rounds of the peer's time over ours in
the same round, with the 95% interval of that median (bootstrap). A training step is forward,
cross-entropy, backward and AdamW. A network that fails, of memory for one, is named in `failed`.

The floor is the least time that an image can take on this device: each operation lasts as long as
its FLOPs at the rate of a large matrix product, or its bytes at the rate of a large copy, whichever
is longer. Both rates are measured in the same run. `floor_fraction` is floor over time. Writes
<name>.json into benchmarks/results after each setting, and <name>.png.
"""
import gc
import itertools
import statistics
from typing import NamedTuple

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
import torchvision
from common import (
    autocast,
    environment,
    interleaved,
    make_parser,
    median_ratio,
    result_path,
    seconds_of,
    write_result,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_nb.accelerate import accelerate, graphed
from convnext_nb.blocks import ConvNeXtBlock, Downsample, LayerNorm, LayerNorm2d, Stem
from convnext_nb.data import pick_device
from convnext_nb.model import VARIANTS, count_macs, count_params, create_model

try:
    import transformers
except ImportError:
    transformers = None

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ["forward", "training step"]
CODES = ["eager", "compiled", "graph", "compiled+graph"]


class MetaNorm(LayerNorm2d):
    "LayerNorm over the channels written out, as Meta's code has it for its channels-first maps."
    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class MetaBlock(ConvNeXtBlock):
    "The block in the order of Meta's code: every step a separate operation, the linears torch's."
    def forward(self, x):
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp.act(F.linear(y, fc1.weight, fc1.bias))
        y = F.linear(y, fc2.weight, fc2.bias)
        return x + self.drop_path((self.gamma * y).permute(0, 3, 1, 2))


def meta_layout(name):
    "Our network with Meta's norms and blocks in place of ours."
    net = create_model(name)
    for m in net.modules():
        if type(m) is LayerNorm2d: m.__class__ = MetaNorm
        if type(m) is LayerNorm: m.__class__ = nn.LayerNorm
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
    config = getattr(transformers, f"{family}Config")(
        depths=list(v["depths"]), hidden_sizes=list(v["dims"]), num_labels=1000)
    return Logits(getattr(transformers, f"{family}ForImageClassification")(config))


def networks(name):
    "The same network from each origin, by label."
    nets = {"ours": create_model(name), "ours, accelerated": create_model(name),
            "timm": timm.create_model(name, conv_mlp=False),
            "timm, conv_mlp": timm.create_model(name, conv_mlp=True)}
    theirs = getattr(torchvision.models, name, None)
    if theirs: nets["torchvision"] = theirs(stochastic_depth_prob=0.)
    if transformers: nets["Hugging Face"] = hugging_face(name)
    if "v2" not in name: nets["Meta's layout"] = meta_layout(name)
    assert len({count_params(n) for n in nets.values()}) == 1
    return nets


def fastest(repeats, device, f, *args):
    return min(seconds_of(device, f, *args) for _ in range(repeats))


def matrix_flops_per_s(device, dtype, repeats):
    "Of a product of large matrices; no larger than a device needs .1 s for, once that is passed."
    def product(m, out): torch.mm(m, m, out=out)
    side, largest = 512, 8192 if device.type == "cuda" else 2048
    while True:
        m = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(m)
        if side == largest or fastest(2, device, product, m, out) > .1: break
        side *= 2
    return 2 * side**3 / fastest(repeats, device, product, m, out)


def copied_bytes_per_s(device, repeats):
    "Read and written by a large copy."
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / fastest(repeats, device, target.copy_, source)


def peaks(device, dtypes, repeats=10):
    "What the hardware can do, in each dtype: the fastest of `repeats`."
    flops = {d: matrix_flops_per_s(device, getattr(torch, d), repeats) for d in dtypes}
    return dict(flops_per_s=flops, bytes_per_s=copied_bytes_per_s(device, repeats))


# What a block does at least, in order: depthwise convolutions, matrix products of its MLP, and
# passes over maps of its width; elementwise steps ride along.
FORWARD = [
    (1, 0, 2),   # convolution + norm
    (0, 1, 5),   # fc1 + GELU
    (0, 1, 6)]   # fc2 + gamma + shortcut
BACKWARD = [
    (0, 0, 3),               # gamma, and its input kept forward
    (0, 1, 9), (0, 1, 5),    # fc2 and GELU
    (0, 1, 5), (0, 1, 5),    # fc1
    (0, 0, 3),               # norm
    (1, 0, 3), (1, 0, 2)]    # convolution + shortcut, its weights
BLOCK_OPERATIONS = {"forward": FORWARD, "training step": FORWARD + BACKWARD}  # 13 and 48 passes


class LayerCost(NamedTuple):
    "What a layer costs for one image."
    layer: nn.Module
    flops: int      # forward
    inputs: int     # numbers
    outputs: int    # numbers


def layer_costs(name, image_size):
    "`LayerCost` of the stem, of each downsampling and block, and of the classifier."
    costs = []
    def note(m, inputs, out):
        flops = counter.get_total_flops() - sum(c.flops for c in costs)
        costs.append(LayerCost(m, flops, inputs[0].numel(), out.numel()))
    with torch.device("meta"):
        net, image = create_model(name), torch.empty(1, 3, image_size, image_size)
    for m in net.modules():
        if isinstance(m, (Stem, Downsample, ConvNeXtBlock)) or m is net.head.fc:
            m.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(image)
    return costs


def floor_us(name, image_size, mode, itemsize, flops_per_s, bytes_per_s):
    """Microseconds that an image needs at least: operation by operation, bound by arithmetic or by
    memory. GRN and AdamW are not counted."""
    def seconds(flops, numbers): return max(flops / flops_per_s, numbers * itemsize / bytes_per_s)
    total = 0
    for layer, flops, inputs, outputs in layer_costs(name, image_size):
        if not isinstance(layer, ConvNeXtBlock):
            # the gradients to inputs and to weights cost as much as the layer itself
            total += seconds(flops, inputs + outputs) * (1 if mode == "forward" else 3)
            continue
        conv = 2 * outputs * layer.conv_dw.weight[0].numel()
        product = (flops - conv) / 2
        for convs, products, passes in BLOCK_OPERATIONS[mode]:
            total += seconds(convs * conv + products * product, passes * outputs)
    return 1e6 * total


class Setting(NamedTuple):
    "How the networks are run."
    mode: str
    dtype: str
    memory_format: str
    code: str

    def __str__(self): return ", ".join(self)

    def failure(self, network, error):
        "What the result says of a network that failed."
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return self._asdict() | dict(network=network, error=first_line)


class Racer:
    "A network in one setting: compiled, tuned, and warm after two rounds."
    def __init__(self, label, net, setting, x, y, pool=None):
        self.training = setting.mode != "forward"
        self.x, self.y, self.dtype = x, y, getattr(torch, setting.dtype)
        self.net = net.train(self.training)
        if label == "ours, accelerated":
            with autocast(x.device, self.dtype): accelerate(net, x)
        graph = "graph" in setting.code
        self.optimizer = torch.optim.AdamW(
            net.parameters(), lr=1e-4, fused=x.is_cuda or None, capturable=graph
        ) if self.training else None
        self.run = torch.compile(net) if "compiled" in setting.code else net
        for _ in range(2): self.step()
        self.memory = dict(peak_bytes=self.peak_bytes()) if x.is_cuda else {}
        if graph: self.step = graphed(self.step, pool=pool)

    def step(self):
        "Forward, or a whole training step."
        with torch.inference_mode(not self.training), autocast(self.x.device, self.dtype):
            out = self.run(self.x)
            if self.training: loss = F.cross_entropy(out, self.y)
        if not self.training: return
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self): return seconds_of(self.x.device, self.step)

    def peak_bytes(self):
        "Peak memory of a step, with this network's weights and state but no other network's."
        torch.cuda.synchronize()
        tensors = [*self.net.parameters(), self.x, self.y]
        if self.training:
            for state in self.optimizer.state.values(): tensors += state.values()
        others = torch.cuda.memory_allocated() - sum(t.nbytes for t in tensors)
        torch.cuda.reset_peak_memory_stats()
        self.seconds()
        return torch.cuda.max_memory_allocated() - others


def free_memory():
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


def start_racers(a, device, setting):
    "A racer for each network, and those that failed."
    memory_format = FORMATS[setting.memory_format]
    nets = {label: net.to(device, memory_format=memory_format)
            for label, net in networks(a.model).items()
            if not a.networks or label in ("ours", *a.networks)}
    x = torch.randn(a.batch_size, 3, a.image_size, a.image_size, device=device)
    x = x.to(memory_format=memory_format)
    y = torch.randint(1000, (a.batch_size,), device=device)
    racers, failed = {}, []
    # graphs keep their memory, so they share it
    pool = torch.cuda.graph_pool_handle() if "graph" in setting.code else None
    for label in list(nets):
        try: racers[label] = Racer(label, nets.pop(label), setting, x, y, pool)
        except (RuntimeError, ValueError) as e: failed.append(setting.failure(label, e))
        if label in racers: continue
        free_memory()
        print(f"{setting}: {label} failed: {failed[-1]['error']}", flush=True)
    return racers, failed


def measure(a, device, setting, floor):
    "Speed of every network in one setting, None without ours; and the networks that failed."
    racers, failed = start_racers(a, device, setting)
    if "ours" not in racers: return None, failed
    seconds = {label: [] for label in racers}
    for _, label in interleaved(list(racers), a.rounds, a.seconds):
        seconds[label].append(racers[label].seconds())
    rows = {}
    for label, mine in seconds.items():
        speed = a.batch_size / statistics.median(mine)
        ratio = median_ratio([m / o for m, o in zip(mine, seconds["ours"])])
        rows[label] = dict(images_per_s=speed, **ratio, floor_fraction=speed * floor / 1e6,
                           **racers[label].memory)
    print_speeds(setting, rows)
    peers = [label for label in rows if not label.startswith("ours")]
    fastest_peer = min(peers, key=lambda label: rows[label]["ratio"], default=None)
    return setting._asdict() | dict(rounds=len(seconds["ours"]), floor_us=floor,
                                    fastest_peer=fastest_peer, networks=rows), failed


def print_speeds(setting, rows):
    "Our speed, and the ratio of every other network."
    others = [f"{label} {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
              for label, r in rows.items() if label != "ours"]
    ours = f"ours {rows['ours']['images_per_s']:.1f} images/s"
    print(f"{setting}: {'; '.join([ours, *others])}", flush=True)


def title_of(row):
    return f"{row['dtype']}, {row['memory_format']}, {row['code']}"


def labels_of(rows): return list(dict.fromkeys(label for r in rows for label in r["networks"]))


def table(rows):
    "The share of the floor's speed that each network reaches, one line a setting."
    labels = labels_of(rows)
    lines = [["", "floor, us an image", *labels]]
    for r in rows:
        nets = r["networks"]
        shares = [f"{nets[k]['floor_fraction']:.1%}" if k in nets else "failed" for k in labels]
        lines.append([f"{r['mode']}, {title_of(r)}", f"{r['floor_us']:,.1f}", *shares])
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    def align(line): return [line[0].ljust(first), *map(str.rjust, line[1:], others)]
    return "\n".join("  ".join(align(line)) for line in lines)


MARKS = {
    "ours": ("o", "C0"), "ours, accelerated": ("D", "C3"), "timm": ("s", "C1"),
    "timm, conv_mlp": ("^", "C2"), "torchvision": ("v", "C4"), "Hugging Face": ("P", "C5"),
    "Meta's layout": ("X", "C7")}


def draw(rows, title, path):
    "A panel for each mode, a row for each setting, a mark for each network: images a second."
    titles = list(dict.fromkeys(map(title_of, rows)))
    modes, labels = list(dict.fromkeys(r["mode"] for r in rows)), labels_of(rows)
    size = (max(11, 2.2 + 4.4 * len(modes)), 1.6 + .36 * len(titles))
    fig, axes = plt.subplots(1, len(modes), figsize=size, layout="constrained", sharey=True,
                             squeeze=False)
    for ax, mode in zip(axes[0], modes):
        for label in labels:
            shown = [r for r in rows if r["mode"] == mode and label in r["networks"]]
            speeds = [r["networks"][label]["images_per_s"] for r in shown]
            places = [titles.index(title_of(r)) for r in shown]
            (marker, color), ours = MARKS.get(label, ("*", "k")), label.startswith("ours")
            ax.plot(speeds, places, marker, color=color, ms=9 if ours else 6,
                    mec="k" if ours else "none", zorder=2 + ours, label=label)
        ax.set(xlim=(0, 1.05 * ax.get_xlim()[1]), ylim=(len(titles) - .5, -.5),
               xlabel=f"{mode}, images/s", yticks=range(len(titles)), yticklabels=titles)
        ax.grid(alpha=.3)
    fig.suptitle(title, fontsize=11)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center",
               ncols=len(labels), fontsize=8, frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def read_options():
    parser = make_parser(__doc__, "throughput")
    def choose(name, choices, default, help=None):
        parser.add_argument(name, nargs="+", choices=choices, default=default, help=help)
    add = parser.add_argument
    add("--model", default="convnext_tiny")
    add("--image_size", type=int, default=224)
    add("--batch_size", type=int, help="default: 4 on a CPU, 256 on a GPU")
    add("--rounds", type=int, default=25, help="in each setting")
    add("--seconds", type=float, default=30,
        help="no further round of a setting begins after these, once three are done")
    choose("--codes", CODES, CODES[:1],
           "compiled: torch.compile on the whole network; graph: the whole step as a CUDA graph")
    choose("--formats", list(FORMATS), list(FORMATS), "memory formats")
    choose("--dtypes", ["float32", "bfloat16"], ["float32"], "bfloat16: autocast")
    choose("--modes", MODES, MODES)
    choose("--networks", list(MARKS), None, "these alone, and ours; default: all")
    return parser.parse_args()


def print_rates(rates):
    "What the hardware can do."
    flops = [f"{dtype} {r / 1e12:.3g} TFLOP/s" for dtype, r in rates["flops_per_s"].items()]
    print(f"{'; '.join(flops)}; {rates['bytes_per_s'] / 1e9:,.3g} GB/s", flush=True)


def main():
    a = read_options()
    device = pick_device(a.device)
    if device.type != "cuda" and any("graph" in code for code in a.codes):
        a.codes = [code for code in a.codes if "graph" not in code]
        if not a.codes: raise SystemExit("throughput.py: error: a CUDA graph needs a GPU")
        print("left out: CUDA graphs (there is no GPU)")
    a.batch_size = a.batch_size or (256 if device.type == "cuda" else 4)
    name, where = a.name or f"throughput_{device.type}", environment(device)
    rates = peaks(device, a.dtypes, repeats=min(10, a.rounds))
    if not transformers: print("left out: Hugging Face (transformers is not installed)")
    print_rates(rates)
    config = {k: v for k, v in vars(a).items() if k not in ("name", "device")} | dict(
        timm=timm.__version__, transformers=transformers and transformers.__version__,
        macs=count_macs(create_model(a.model), (3, a.image_size, a.image_size)))
    rows, failed = [], []
    for code, dtype, fmt, mode in itertools.product(a.codes, a.dtypes, a.formats, a.modes):
        torch.manual_seed(0)
        setting, itemsize = Setting(mode, dtype, fmt, code), getattr(torch, dtype).itemsize
        floor = floor_us(a.model, a.image_size, mode, itemsize, rates["flops_per_s"][dtype],
                         rates["bytes_per_s"])
        try: row, without = measure(a, device, setting, floor)
        except torch.OutOfMemoryError as e: row, without = None, [setting.failure("all", e)]
        if row: rows.append(row)
        failed += without
        torch.compiler.reset()
        free_memory()
        # after each setting: what is interrupted keeps what it has
        path = write_result(name, **where, config=config, peaks=rates, settings=rows, failed=failed)
    if not rows:
        first = f"{failed[-1]['network']}: {failed[-1]['error']}"
        raise SystemExit(f"throughput.py: error: our network ran under no setting; {first}")
    title = f"{a.model} at {a.image_size}, batch {a.batch_size}, {where['device']}"
    draw(rows, title, result_path(name, ".png"))
    print(table(rows), path, sep="\n")


if __name__ == "__main__": main()
