"""The kernels of chapter 06 beside PyTorch's, for the maps of each stage: chain (depthwise convolution and LayerNorm) and whole block.

    python benchmarks/kernels.py                         convnext_tiny's four stages at 224
    python benchmarks/kernels.py --dtypes bfloat16       in one precision only

Inference is a call without gradients, training a call and its gradients to input and parameters. A round runs every candidate once, in a random
order; `ratio` is the median over rounds of PyTorch's time in channels_last over the candidate's in the same round, above 1 where the candidate is
faster, with the 95% interval of that median. `summary` has the geometric mean over the stages, and the least of them.
Writes benchmarks/results/<name>.json.
"""
import argparse
import random
import statistics
import time
from copy import deepcopy

import torch
from common import environment, interval, write
from torch import nn

from convnext_nb.blocks import ConvNeXtBlock, randomize
from convnext_nb.data import pick_device
from convnext_nb.kernels import candidates, depthwise_conv, layer_norm
from convnext_nb.model import VARIANTS

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", default="convnext_tiny")
ap.add_argument("--image_size", type=int, default=224)
ap.add_argument("--batch_size", type=int, help="default: 4 on a CPU, 256 on a GPU")
ap.add_argument("--rounds", type=int, default=15)
ap.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"], help="other than float32: autocast")
ap.add_argument("--device")
ap.add_argument("--name", help="of the result; default: kernels_<device>")


class Chain(nn.Module):
    "Depthwise convolution and LayerNorm of a block, as PyTorch has them: (N, C, H, W) -> (N, H, W, C)."
    def __init__(self, block):
        super().__init__()
        self.conv_dw, self.norm = block.conv_dw, block.norm

    def forward(self, x): return self.norm(self.conv_dw(x).permute(0, 2, 3, 1))


class FastChain(Chain):
    "The same by the operations of convnext_nb.kernels."
    def forward(self, x):
        y = depthwise_conv(x.permute(0, 2, 3, 1), self.conv_dw.weight, self.conv_dw.bias)
        return layer_norm(y, self.norm.weight, self.norm.bias, self.norm.eps) if x.is_cuda else self.norm(y)


def variants(block):
    "Candidates by part and label, each with the memory format that it gets; the first of each part is what the others are held against."
    def as_class(cls):
        fast = deepcopy(block)
        fast.__class__ = cls
        return fast
    last, first = torch.channels_last, torch.contiguous_format
    return {"chain": {"PyTorch, channels_last": (Chain(block), last), "PyTorch, contiguous": (Chain(deepcopy(block)), first), "ours": (FastChain(block), last)},
            "block": {"ConvNeXtBlock, channels_last": (block, last), "ConvNeXtBlock, contiguous": (deepcopy(block), first),
                      **{cls.__name__: (as_class(cls), last) for cls in candidates(block)}}}


def measure(runs, x, mode, rounds):
    "Milliseconds and ratio of every candidate."
    calls = 10 if x.is_cuda else 1  # one after the other, so that a GPU does not wait for Python

    def once(m, fmt):
        training, inputs = mode == "training", x.detach().to(memory_format=fmt).requires_grad_(mode == "training")
        if x.is_cuda: torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            with torch.set_grad_enabled(training):
                with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32): y = m(inputs)
                if training: torch.autograd.grad(y, [inputs, *m.parameters()], torch.ones_like(y))
        if x.is_cuda: torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    for m, fmt in runs.values():
        for _ in range(3): once(m.train(mode == "training"), fmt)
    order, seconds = random.Random(0), {k: [] for k in runs}
    for _ in range(rounds):
        for k in order.sample(list(runs), len(runs)): seconds[k].append(once(*runs[k]))
    base = seconds[next(iter(runs))]
    return {k: dict(ms=1e3 * statistics.median(t), **interval([b / s for b, s in zip(base, t)])) for k, t in seconds.items()}


def summarize(settings):
    "Geometric mean and least ratio over the stages, for each part, mode, dtype and candidate."
    rows = {}
    for s in settings:
        for k, r in s["candidates"].items(): rows.setdefault((s["part"], s["mode"], s["dtype"], k), []).append(r["ratio"])
    return [dict(part=p, mode=m, dtype=d, candidate=k, geometric_mean=statistics.geometric_mean(r), least=min(r)) for (p, m, d, k), r in rows.items()]


def main():
    a = ap.parse_args()
    device = pick_device(a.device)
    a.batch_size = a.batch_size or (256 if device.type == "cuda" else 4)
    where, settings = environment(device), []
    config = {k: v for k, v in vars(a).items() if k not in ("name", "device")}
    for dtype in a.dtypes:
        for stage, dim in enumerate(VARIANTS[a.model]["dims"]):
            torch.manual_seed(0)
            size = a.image_size // (4 * 2 ** stage)
            x = torch.randn(a.batch_size, dim, size, size, device=device, dtype=getattr(torch, dtype))
            block = randomize(ConvNeXtBlock(dim)).to(device)
            for part, runs in variants(block).items():
                for mode in ("inference", "training"):
                    rows = measure(runs, x, mode, a.rounds)
                    settings.append(dict(part=part, stage=stage, channels=dim, size=size, dtype=dtype, mode=mode, candidates=rows))
                    print(f"{part}, {mode}, {dtype}, {dim} x {size} x {size}: " + "; ".join(f"{k} {r['ms']:.2f} ms, {r['ratio']:.2f}" for k, r in rows.items()), flush=True)
        path = write(a.name or f"kernels_{device.type}", **where, config=config, settings=settings, summary=summarize(settings))
    for row in summarize(settings): print("{part}, {mode}, {dtype}, {candidate}: {geometric_mean:.2f}, least {least:.2f}".format(**row))
    print(path)


if __name__ == "__main__": main()
