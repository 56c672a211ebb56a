"""The kernels of chapters 06 and 07 beside PyTorch's, for the maps of each stage: chain (depthwise
convolution and LayerNorm) and whole block; and a whole network, on a quarter of the images.

    python benchmarks/kernels.py                         convnext_tiny's four stages at 224
    python benchmarks/kernels.py --dtypes bfloat16       in one precision only

Inference is a call without gradients, training a call and its gradients to input and parameters. On
CUDA ten calls are one CUDA graph, so that kernels are timed and not Python. A round runs every
candidate once, in a random order; `ratio` is the median over rounds of PyTorch's time in
channels_last over the candidate's in the same round, above 1 where the candidate is faster, with
the 95% interval of that median. `summary` has the geometric mean over the stages, and the least of
them. What is timed must be right: `error` is the largest relative difference, of the output and in
training of any gradient, from PyTorch's in float32; `excess` is that difference over what PyTorch
itself has there in this precision, and one rounding. Above 3 it is too much: the result is
written, and the status is 1. Writes <name>.json into benchmarks/results.
"""
import statistics
from copy import deepcopy
from functools import partial

import torch
from common import (
    autocast,
    environment,
    interleaved,
    make_parser,
    median_ratio,
    seconds_of,
    write_result,
)
from torch import nn

from convnext_nb.accelerate import accelerate, candidates, graphed
from convnext_nb.blocks import ConvNeXtBlock, randomize
from convnext_nb.data import pick_device
from convnext_nb.kernels import depthwise_conv, layer_norm
from convnext_nb.model import VARIANTS, create_model


class Chain(nn.Module):
    "Depthwise convolution and LayerNorm of a block, by PyTorch's operations."
    def __init__(self, block):
        super().__init__()
        self.conv_dw, self.norm = block.conv_dw, block.norm

    def forward(self, x):                                       # (N, C, H, W)
        return self.norm(self.conv_dw(x).permute(0, 2, 3, 1))   # (N, H, W, C)


class FastChain(Chain):
    "The same by the operations of convnext_nb.kernels."
    def forward(self, x):
        conv, norm = self.conv_dw, self.norm
        y = depthwise_conv(x.permute(0, 2, 3, 1), conv.weight, conv.bias)
        return layer_norm(y, norm.weight, norm.bias, norm.eps) if x.is_cuda else norm(y)


def racers(block):
    """Modules by part and label, each with the memory format of its input; the first of each part
    is what the others are held against."""
    def as_class(cls):
        fast = deepcopy(block)
        fast.__class__ = cls
        return fast
    last, first = torch.channels_last, torch.contiguous_format
    chain = {"PyTorch, channels_last": (Chain(block), last),
             "PyTorch, contiguous": (Chain(deepcopy(block)), first),
             "ours": (FastChain(block), last)}
    blocks = {"ConvNeXtBlock, channels_last": (block, last),
              "ConvNeXtBlock, contiguous": (deepcopy(block), first)}
    blocks |= {cls.__name__: (as_class(cls), last) for cls in candidates(block)}
    return dict(chain=chain, block=blocks)


def call(module, inputs, upstream=None):
    "What a module gives, and with the gradient of that its gradients to input and parameters."
    with torch.set_grad_enabled(upstream is not None):
        with autocast(inputs.device, inputs.dtype): y = module(inputs)
        if upstream is None: return [y]
        return [y, *torch.autograd.grad(y, [inputs, *module.parameters()], upstream)]


def arguments(module, memory_format, x, training):
    "For `call`: the input in that layout, and in training random numbers like the output."
    inputs = x.detach().to(memory_format=memory_format).requires_grad_(training)
    y, = call(module.train(training), inputs)
    if not training: return module, inputs
    same = torch.Generator(x.device).manual_seed(0)
    random = torch.randn(y.shape, generator=same, device=x.device)
    return module, inputs, torch.empty_like(y).copy_(random)


def errors(modules, x, training):
    "Error and excess of each module: see above."
    def run(how, x): return call(*arguments(*how, x, training))
    def relative(a, b):
        assert a.shape == b.shape
        return ((a.float() - b).norm() / b.norm()).item()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = run(next(iter(modules.values())), x.float())
    rounding = max(torch.finfo(x.dtype).eps / 2, 1e-4)
    found = {k: list(map(relative, run(how, x), exact)) for k, how in modules.items()}
    allowed = [e + rounding for e in next(iter(found.values()))]
    def largest(values): return torch.tensor([*values]).max().item()  # nan is the largest
    return {k: dict(error=largest(mine), excess=largest(e / b for e, b in zip(mine, allowed)))
            for k, mine in found.items()}


def start(args):
    "A function for ten calls on a GPU, or one on a CPU, and their number; warm."
    def run(times):
        for _ in range(times): call(*args)
    if not args[1].is_cuda:
        run(3)
        return partial(run, 1), 1
    return graphed(partial(run, 10), warmup=1), 10


def measure(modules, x, mode, rounds):
    "Milliseconds and ratio of every module."
    training = mode == "training"
    exactness = errors(modules, x, training)
    started = {label: start(arguments(*how, x, training)) for label, how in modules.items()}
    times = {label: [] for label in modules}
    for _, label in interleaved(list(modules), rounds):
        run, calls = started[label]
        times[label].append(seconds_of(x.device, run) / calls)
    base = next(iter(times.values()))
    return {label: dict(ms=1e3 * statistics.median(mine), **exactness[label],
                        **median_ratio([b / m for b, m in zip(base, mine)]))
            for label, mine in times.items()}


def measure_parts(a, x, parts, **setting):
    "A row for each part and mode."
    rows = []
    for part, modules in parts.items():
        for mode in ("inference", "training"):
            found = measure(modules, x, mode, a.rounds)
            rows.append(dict(part=part, **setting, mode=mode, candidates=found))
            said = (f"{k} {r['ms']:.2f} ms, {r['ratio']:.2f}, error {r['error']:.1e}"
                    for k, r in found.items())
            print(f"{part}, {mode}, {setting}: {'; '.join(said)}", flush=True)
    return rows


def measure_stage(a, device, dtype, stage):
    "Chain and block on the maps of one stage."
    dim, size = VARIANTS[a.model]["dims"][stage], a.image_size // (4 * 2 ** stage)
    torch.manual_seed(0)
    x = torch.randn(a.batch_size, dim, size, size, device=device, dtype=getattr(torch, dtype))
    parts = racers(randomize(ConvNeXtBlock(dim)).to(device))
    return measure_parts(a, x, parts, stage=stage, channels=dim, size=size, dtype=dtype)


def measure_network(a, device, dtype):
    "A whole network on a quarter of the images."
    torch.manual_seed(0)
    shape = max(1, a.batch_size // 4), 3, a.image_size, a.image_size
    x = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
    net = randomize(create_model(a.model)).to(device)
    nets = {"ConvNeXt": net, "accelerate": accelerate(deepcopy(net))}
    parts = dict(network={k: (m, torch.channels_last) for k, m in nets.items()})
    return measure_parts(a, x, parts, size=a.image_size, dtype=dtype)


def wrong(settings):
    "A line for each candidate that is less exact than it may be."
    for s in settings:
        where = f"{s['part']}, {s['mode']}, {s['dtype']}, size {s['size']}"
        for label, r in s["candidates"].items():
            if not r["excess"] <= 3:  # or nan
                yield f"{where}: {label} has an error of {r['error']:.1e}, {r['excess']:.1f} " \
                      "times PyTorch's"


def summarize(settings):
    "Geometric mean and least ratio over the stages, for each part, mode, dtype and candidate."
    ratios = {}
    for s in settings:
        for label, r in s["candidates"].items():
            key = s["part"], s["mode"], s["dtype"], label
            ratios.setdefault(key, []).append(r["ratio"])
    return [dict(zip(("part", "mode", "dtype", "candidate"), key),
                 geometric_mean=statistics.geometric_mean(r), least=min(r))
            for key, r in ratios.items()]


def read_options():
    parser = make_parser(__doc__, "kernels")
    add, dtypes = parser.add_argument, ["float32", "bfloat16", "float16"]
    add("--model", default="convnext_tiny")
    add("--image_size", type=int, default=224)
    add("--batch_size", type=int, help="default: 4 on a CPU, 256 on a GPU")
    add("--rounds", type=int, default=15)
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2],
        help="other than float32: autocast")
    return parser.parse_args()


def main():
    a = read_options()
    device = pick_device(a.device)
    a.batch_size = a.batch_size or (256 if device.type == "cuda" else 4)
    name, where, settings = a.name or f"kernels_{device.type}", environment(device), []
    config = {k: v for k, v in vars(a).items() if k not in ("name", "device")}
    for dtype in a.dtypes:
        stages = range(len(VARIANTS[a.model]["dims"]))
        measures = (partial(measure_stage, stage=i) for i in stages)
        for measure_some in (*measures, measure_network):
            settings += measure_some(a, device, dtype)
            # after each: what is interrupted keeps what it has
            path = write_result(name, **where, config=config, settings=settings,
                                summary=summarize(settings))
    line = "{part}, {mode}, {dtype}, {candidate}: {geometric_mean:.2f}, least {least:.2f}"
    for row in summarize(settings): print(line.format(**row))
    print(path)
    if found := list(wrong(settings)): raise SystemExit("\n".join(found))


if __name__ == "__main__": main()
