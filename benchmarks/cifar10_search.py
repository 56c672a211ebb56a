r"""The search for a ConvNeXt that learns CIFAR-10 within minutes: one network, one recipe, one run.

    python benchmarks/cifar10_search.py --data_dir TREE batch=128 norm=layer muon_lr=.024

What is not named has the value that it has in OPTIONS. The network is built here, so that what the
search tried and gave up burdens nobody else. 45,000 training images train, in one thread; accuracy
is that on the 5,000 held out, plain and averaged with the mirrored view. The test images are not
read. Runs went in pairs, one on each core. Each is added to benchmarks/results/<name>.json.
"""
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import Steps, cifar10_splits, environment, make_parser, read_result, write_result
from torch import nn

from convnext_nb.accelerate import keep_freed_memory
from convnext_nb.blocks import LayerNorm2d
from convnext_nb.data import DataConfig, MemoryLoader
from convnext_nb.model import count_macs, count_params
from convnext_nb.train import orthogonalize, update_ema

OPTIONS = dict(
    # the network
    dims="64,128,256", depths="1,2,2", kernel=3, gamma=1.,  # 0: no LayerScale
    mlp_ratio="2",        # of all stages, or one for each
    # patch: 2x2; patch:1; conv:24: a 2x2 convolution of 24 channels, GELU, and 2x2 patches of it
    stem="patch",
    whiten="no",          # yes: the stem begins as the whitening of its patches
    norm="batch",         # batch or layer
    momentum_bn=.1,       # share of a step in BatchNorm's running statistics
    head_norm="batch",    # batch or layer
    # standard; middle: the depthwise convolution between the MLP's two layers; inverted: the same
    # with norm and GELU after each (the ladder's rung); full: 3x3 convolution, norm, GELU, 1x1;
    # norms3: a norm after each layer (the rung "fewer activations"); norms2: after the MLP's two
    block="standard",
    # conv: norm, 2x2 convolution of stride 2; pool: 1x1, max-pooling, norm; pool3: 3x3,
    # max-pooling, norm, GELU
    down="conv",
    # the recipe
    images=45000, batch=128, smoothing=.2, max_shift=2, seed=0,
    muon_lr=.056, adamw_lr=.02, weight_decay=.05, momentum=.9, muon_steps=5,
    muon="all",           # all; mixing: not the depthwise kernels
    # yes: a matrix's norm is kept, and a step has singular values of muon_lr
    normalize="no",
    warmup=.1,            # share of the steps; then the rate falls linearly to 0
    ema=0.,
)


def read_changes(texts):
    "name=value of each change, as OPTIONS has them."
    options = dict(OPTIONS)
    for text in texts:
        name, _, value = text.partition("=")
        if name not in OPTIONS:
            raise SystemExit(f"unknown option {name!r}; use {', '.join(OPTIONS)}")
        options[name] = type(OPTIONS[name])(value)
    return options


def norm2d(o, dim):
    if o["norm"] == "layer": return LayerNorm2d(dim)
    return nn.BatchNorm2d(dim, momentum=o["momentum_bn"])


class Block(nn.Module):
    "A residual block of one of the kinds that OPTIONS lists."
    def __init__(self, o, dim, ratio):
        super().__init__()
        k, hidden = o["kernel"], int(dim * ratio)
        def depthwise(c): return nn.Conv2d(c, c, k, padding=k // 2, groups=c)
        def norm(c): return norm2d(o, c)
        up, down = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.branch = nn.Sequential(*dict(
            standard=lambda: [depthwise(dim), norm(dim), up, nn.GELU(), down],
            middle=lambda: [up, depthwise(hidden), norm(hidden), nn.GELU(), down],
            inverted=lambda: [up, norm(hidden), nn.GELU(), depthwise(hidden), norm(hidden),
                              nn.GELU(), down],
            full=lambda: [nn.Conv2d(dim, hidden, k, padding=k // 2), norm(hidden), nn.GELU(), down],
            norms3=lambda: [depthwise(dim), norm(dim), up, norm(hidden), nn.GELU(), down,
                            norm(dim)],
            norms2=lambda: [depthwise(dim), up, norm(hidden), nn.GELU(), down, norm(dim)],
        )[o["block"]]())
        gamma = torch.full((dim, 1, 1), o["gamma"])
        self.gamma = nn.Parameter(gamma) if o["gamma"] else None

    def forward(self, x):
        y = self.branch(x)
        return x + y if self.gamma is None else torch.addcmul(x, y, self.gamma)


def make_stem(o, dim):
    kind, _, number = o["stem"].partition(":")
    if kind == "patch":
        side = int(number or 2)
        return nn.Sequential(nn.Conv2d(3, dim, side, side), norm2d(o, dim))
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, int(number), 2), nn.GELU(),
                         nn.Conv2d(int(number), dim, 2, 2), norm2d(o, dim))


def make_down(o, dim, out):
    return dict(
        conv=lambda: [norm2d(o, dim), nn.Conv2d(dim, out, 2, 2)],
        pool=lambda: [nn.Conv2d(dim, out, 1), nn.MaxPool2d(2), norm2d(o, out)],
        pool3=lambda: [nn.Conv2d(dim, out, 3, padding=1), nn.MaxPool2d(2), norm2d(o, out),
                       nn.GELU()])[o["down"]]()


class Network(nn.Module):
    "(N, 3, 32, 32) -> (N, 10)"
    def __init__(self, o):
        super().__init__()
        dims, depths = ([int(v) for v in o[k].split(",")] for k in ("dims", "depths"))
        ratios = [float(r) for r in o["mlp_ratio"].split(",")]
        self.stem, layers = make_stem(o, dims[0]), []
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            if i: layers += make_down(o, dims[i - 1], dim)
            layers += [Block(o, dim, ratios[min(i, len(ratios) - 1)]) for _ in range(depth)]
        self.stages, self.fc = nn.Sequential(*layers), nn.Linear(dims[-1], 10)
        self.norm = nn.LayerNorm(dims[-1], 1e-6)
        if o["head_norm"] == "batch": self.norm = nn.BatchNorm1d(dims[-1])
        for m in self.modules():
            if not isinstance(m, (nn.Conv2d, nn.Linear)): continue
            std = .02 if m is self.fc else m.weight[0].numel() ** -.5
            nn.init.normal_(m.weight, std=std)
            nn.init.zeros_(m.bias)

    def forward(self, x): return self.fc(self.norm(self.stages(self.stem(x)).mean((2, 3))))


@torch.no_grad()
def whiten(conv, images):
    "Patches that a convolution sees get uncorrelated outputs of variance 1, turned at random."
    n, side = conv.weight[0].numel(), conv.kernel_size[0]
    patches = F.unfold(images, side, stride=conv.stride).transpose(1, 2).reshape(-1, n)
    values, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (values + 1e-3).sqrt()).T
    q = torch.linalg.qr(torch.randn(max(len(conv.weight), n), n))[0][:len(conv.weight)]
    conv.weight.copy_((q @ filters * (len(conv.weight) / n) ** .5).view_as(conv.weight))


class Muon:
    "Nesterov's momentum, orthogonalized, matrices of one shape together."
    def __init__(self, params, o):
        self.o, self.groups = o, {}
        for p in params: self.groups.setdefault(tuple(p.flatten(1).shape), []).append(p)
        self.averages = {k: torch.zeros(len(v), *k) for k, v in self.groups.items()}
        self.norms = {p: p.norm().item() for p in params}

    @torch.no_grad()
    def step(self, left):
        o, lr = self.o, self.o["muon_lr"] * left
        keep = o["normalize"] == "yes"
        for shape, params in self.groups.items():
            grads = torch.stack([p.grad.reshape(shape) for p in params])
            self.averages[shape].lerp_(grads, 1 - o["momentum"])
            ahead = grads.lerp(self.averages[shape], o["momentum"])
            size = 1 if keep else .2 * max(shape) ** .5
            for p, s in zip(params, orthogonalize(ahead, o["muon_steps"])):
                p.mul_(1 - lr * o["weight_decay"]).sub_(s.reshape(p.shape), alpha=lr * size)
                if keep: p.mul_(self.norms[p] / p.norm())


def make_optimizers(net, o):
    "Muon for matrices and kernels, AdamW for vectors and the classifier."
    def by_muon(name, p):
        depthwise = p.ndim == 4 and p.shape[1] == 1
        return p.ndim > 1 and p.shape[1:] != (1, 1) and not name.startswith("fc.") \
            and (o["muon"] == "all" or not depthwise)
    named = list(net.named_parameters())
    rest = [p for n, p in named if not by_muon(n, p)]
    groups = [dict(params=[p for p in rest if p.ndim in (2, 4)], weight_decay=o["weight_decay"]),
              dict(params=[p for p in rest if p.ndim in (1, 3)], weight_decay=0.)]
    return Muon([p for n, p in named if by_muon(n, p)], o), torch.optim.AdamW(groups)


def train(net, loader, o):
    "Train; the seconds of each step."
    muon, adamw = make_optimizers(net, o)
    steps, times = round(o["images"] / o["batch"]), []
    warmup, end = o["warmup"] * steps, time.perf_counter()
    ema = torch.optim.swa_utils.AveragedModel(net) if o["ema"] else None
    for i, (x, y) in enumerate(Steps(loader, steps)):
        left = (i + 1) / (warmup + 1) if i < warmup else (steps - i) / (steps - warmup)
        logits = net(x.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, y, label_smoothing=o["smoothing"])
        loss.backward()
        muon.step(left)
        for g in adamw.param_groups: g["lr"] = o["adamw_lr"] * left
        adamw.step()
        net.zero_grad()
        if ema: update_ema(ema.module, net, torch.tensor(min(o["ema"], i / (10 + i))))
        start, end = end, time.perf_counter()
        times.append(end - start)
    return ema.module if ema else net, times


@torch.no_grad()
def evaluate(net, loader):
    "Accuracy, plain and averaged with the mirrored view."
    net.eval()
    right = torch.zeros(2)
    for x, y in loader:
        logits = net(x.to(memory_format=torch.channels_last))
        both = logits + net(x.flip(3))
        right += torch.stack([(v.argmax(1) == y).float().sum() for v in (logits, both)])
    return (right / len(loader.labels)).tolist()


def summarize(runs):
    "The best run for each number of images seen."
    best = {}
    for r in sorted(runs, key=lambda r: r["val_top1"]):
        best[r["changes"].get("images", OPTIONS["images"])] = r
    def words(changes): return " ".join(f"{k}={v}" for k, v in changes.items()) or "none"
    return [dict(images=n, changes=words(r["changes"]), val_top1=r["val_top1"],
                 val_top1_mirrored=r["val_top1_mirrored"]) for n, r in best.items()]


def main():
    parser = make_parser(__doc__, "cifar10_search")
    parser.add_argument("--data_dir", help="imagefolder tree; without it torchvision downloads")
    parser.add_argument("changes", nargs="*", metavar="NAME=VALUE")
    a = parser.parse_args()
    o, name = read_changes(a.changes), a.name or "cifar10_search_cpu"
    torch.set_num_threads(1)
    keep_freed_memory()
    (images, labels), (val_images, val_labels), info = cifar10_splits(a.data_dir, 1)
    cfg = DataConfig(batch_size=o["batch"], max_shift=o["max_shift"], alternate_flip=True,
                     seed=o["seed"], device="cpu")
    loader = MemoryLoader(torch.from_numpy(images), labels, info, cfg, train=True)
    val_dl = MemoryLoader(torch.from_numpy(val_images), val_labels, info,
                          replace(cfg, batch_size=500))
    torch.manual_seed(o["seed"])
    net = Network(o).to(memory_format=torch.channels_last)
    if o["whiten"] == "yes":
        conv = next(m for m in net.stem if isinstance(m, nn.Conv2d))
        sample = next(iter(MemoryLoader(loader.images, labels, info,
                                        replace(cfg, batch_size=5000))))[0]
        whiten(conv, sample)
    trained, times = train(net, loader, o)
    top1, mirrored = evaluate(trained, val_dl)
    row = dict(changes={k: v for k, v in o.items() if v != OPTIONS[k]}, val_top1=top1,
               val_top1_mirrored=mirrored, seconds=sum(times),
               images_per_s=o["batch"] / statistics.median(times),
               macs=count_macs(net, (3, 32, 32)), params=count_params(net))
    where = environment("cpu", a.data_dir)
    runs = read_result(name).get("runs", [])  # read late: another run may have ended meanwhile
    runs += [row | dict(commit=where["commit"])]
    write_result(name, **where, options=OPTIONS, summary=summarize(runs), runs=runs)
    print(f"{top1:.2%}, with the mirrored view {mirrored:.2%}, {row['images_per_s']:.0f} images/s")


if __name__ == "__main__": main()
