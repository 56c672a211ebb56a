"""The kernels of chapters 06 and 07 beside PyTorch's, for the maps of each stage: chain (depthwise
convolution and LayerNorm) and whole block.

    python benchmarks/kernels.py                         convnext_tiny's four stages at 224
    python benchmarks/kernels.py --dtypes bfloat16       in one precision only

Inference is a call without gradients, training a call and its gradients to input and parameters. On
CUDA ten calls are one CUDA graph, so that kernels are timed and not Python. A round runs every
candidate once, in a random order; `ratio` is the median over rounds of PyTorch's time in
channels_last over the candidate's in the same round, above 1 where the candidate is faster, with
the 95% interval of that median. `summary` has the geometric mean over the stages, and the least of
them. Writes <name>.json into benchmarks/results.
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

from convnext_nb.accelerate import candidates
from convnext_nb.blocks import ConvNeXtBlock, randomize
from convnext_nb.data import pick_device
from convnext_nb.kernels import depthwise_conv, layer_norm
from convnext_nb.model import VARIANTS


class Chain(nn.Module):
    "Depthwise convolution and LayerNorm of a block, as PyTorch has them."
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


def call(module, inputs, training, times):
    "Call a module so many times, with its gradients to input and parameters in training."
    for _ in range(times):
        with torch.set_grad_enabled(training):
            with autocast(inputs.device, inputs.dtype): y = module(inputs)
            if training: torch.autograd.grad(y, [inputs, *module.parameters()], torch.ones_like(y))


def replay(graph, *kept):
    "Replay a graph; what it reads is kept, or the next capture would give it to the system."
    graph.replay()


def start(module, inputs, training):
    "A function for ten calls on a GPU, or one on a CPU, and their number; warm."
    module.train(training)
    def run(times): call(module, inputs, training, times)
    if not inputs.is_cuda:
        run(3)
        return partial(run, 1), 1
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): run(3)  # compiles and tunes
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph): run(10)
    return partial(replay, graph, inputs), 10


def measure(modules, x, mode, rounds):
    "Milliseconds and ratio of every module."
    training, started = mode == "training", {}
    for label, (module, memory_format) in modules.items():
        inputs = x.detach().to(memory_format=memory_format).requires_grad_(training)
        started[label] = start(module, inputs, training)
    times = {label: [] for label in modules}
    for _, label in interleaved(list(modules), rounds):
        run, calls = started[label]
        times[label].append(seconds_of(x.device, run) / calls)
    base = next(iter(times.values()))
    return {label: dict(ms=1e3 * statistics.median(mine),
                        **median_ratio([b / m for b, m in zip(base, mine)]))
            for label, mine in times.items()}


def measure_stage(a, device, dtype, stage):
    "A row for each part and mode, on the maps of one stage."
    dim, size = VARIANTS[a.model]["dims"][stage], a.image_size // (4 * 2 ** stage)
    torch.manual_seed(0)
    x = torch.randn(a.batch_size, dim, size, size, device=device, dtype=getattr(torch, dtype))
    block, rows = randomize(ConvNeXtBlock(dim)).to(device), []
    for part, modules in racers(block).items():
        for mode in ("inference", "training"):
            found = measure(modules, x, mode, a.rounds)
            rows.append(dict(part=part, stage=stage, channels=dim, size=size, dtype=dtype,
                             mode=mode, candidates=found))
            times = [f"{k} {r['ms']:.2f} ms, {r['ratio']:.2f}" for k, r in found.items()]
            setting = f"{part}, {mode}, {dtype}, {dim} x {size} x {size}"
            print(f"{setting}: {'; '.join(times)}", flush=True)
    return rows


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
        for stage in range(len(VARIANTS[a.model]["dims"])):
            settings += measure_stage(a, device, dtype, stage)
            # after each stage: what is interrupted keeps what it has
            path = write_result(name, **where, config=config, settings=settings,
                                summary=summarize(settings))
    line = "{part}, {mode}, {dtype}, {candidate}: {geometric_mean:.2f}, least {least:.2f}"
    for row in summarize(settings): print(line.format(**row))
    print(path)


if __name__ == "__main__": main()
