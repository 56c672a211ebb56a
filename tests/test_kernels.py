"The Triton kernels where no notebook can put them: compiled for a GPU that is not there, and inside torch.compile."
import re
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convnext_nb import kernels
from convnext_nb.model import create_model

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZES = dict(C=384, K=7, ACC=kernels.tl.float32)
KERNELS = {  # arguments that are constants, those that point to float32; other pointers are to bfloat16
    "conv_kernel": (SIZES, "taps bias"), "conv_weight_kernel": (SIZES, "out"),
    "norm_kernel": (SIZES | dict(CHANNELS=512), "w b"), "norm_grad_kernel": (SIZES | dict(CHANNELS=512), "w out"),
    "gelu_kernel": (SIZES | dict(D=1536), "b"), "gelu_grad_kernel": (SIZES | dict(D=1536), "b out"),
    "residual_kernel": (SIZES | dict(D=384), "b gamma keep"), "residual_grad_kernel": (SIZES | dict(D=384), "b gamma keep out"),
    "linear_kernel": (SIZES | dict(I=384, O=1536, GELU=True), "b gamma")}


def usage(kernel, constants, floats, warps, path):
    "Registers of a thread, bytes that it spills, and machine code of `kernel`, compiled for Hopper."
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    scalars = dict(eps="fp32") | {k: "i32" for k in "H W N P rows splits pixels".split()}
    kind = {k: "constexpr" if k in constants else scalars.get(k) or ("*fp32" if k in floats.split() else "*bf16") for k in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(kernel.arg_names) if kind[k].startswith("*")}
    binary = triton.compile(ASTSource(kernel, kind, constants, aligned), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    path.write_bytes(binary.asm["cubin"])
    told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return *(int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK", "LOCAL")), binary.asm["ptx"]


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper_and_does_not_spill(name, tmp_path):
    constants, floats = KERNELS[name]
    for config in getattr(kernels, name).configs:
        registers, stack, local, ptx = usage(getattr(kernels, name).fn, constants | config.kwargs, floats, config.num_warps, tmp_path / "kernel.cubin")
        assert (stack, local) == (0, 0) and registers <= 255, config
        if name == "conv_kernel" and config.kwargs["CHANNELS"] == 32 * config.num_warps:  # one channel a thread: what the chapter counts
            assert 1 <= ptx.count("fma.rn.f32") / (49 * config.kwargs["COLS"]) < 1.1
        if name == "linear_kernel": assert "wgmma" in ptx  # the matrix unit of Hopper


@pytest.mark.parametrize("cls", [kernels.TritonBlock, kernels.FusedBlock, kernels.CPUBlock])
def test_torch_compile_takes_them_whole(cls):
    torch.manual_seed(0)
    net = create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5)
    plain = deepcopy(net)
    for m in net.modules():
        if type(m) is kernels.ConvNeXtBlock: m.__class__ = cls
        if type(m) is kernels.LayerNorm2d and cls is not kernels.CPUBlock: m.__class__ = kernels.TritonNorm2d
    fast = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, size in ((2, 64), (3, 96)):
        x = torch.randn(n, 3, size, size)
        grads = []
        for f in (fast, plain):
            out = f(x)
            grads.append([out, *torch.autograd.grad(out.square().sum(), f.parameters())])
        for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        with torch.no_grad(): torch.testing.assert_close(fast(x), grads[1][0], rtol=1e-3, atol=1e-5)

