"What no notebook can show of the kernels: compiled for a GPU that is not there, and their operations inside torch.compile."
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
    "linear_kernel fc1": (SIZES | dict(I=384, O=1536, GELU=True), "b gamma"), "linear_kernel fc2": (SIZES | dict(I=1536, O=384, GELU=False), "b gamma"),
    "norm_grad_kernel 1536": (SIZES | dict(C=1536, CHANNELS=2048), "w out")}


def usage(kernel, constants, floats, warps, path):
    "Bytes that a thread keeps or spills outside its registers, and assembly of `kernel`, compiled for Hopper."
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    scalars = dict(eps="fp32") | {k: "i32" for k in "H W N P rows splits pixels".split()}
    kind = {k: "constexpr" if k in constants else scalars.get(k) or ("*fp32" if k in floats.split() else "*bf16") for k in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(kernel.arg_names) if kind[k].startswith("*")}
    binary = triton.compile(ASTSource(kernel, kind, constants, aligned), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    path.write_bytes(binary.asm["cubin"])
    told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return *(int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("STACK", "LOCAL")), binary.asm["ptx"]


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper_and_need_not_spill(name, tmp_path):
    (constants, floats), spilled = KERNELS[name], []
    kernel = getattr(kernels, name.split()[0])
    for config in kernel.configs:
        stack, local, ptx = usage(kernel.fn, constants | config.kwargs, floats, config.num_warps, tmp_path / "kernel.cubin")
        spilled.append(stack + local)
        if name == "conv_kernel" and config.kwargs["CHANNELS"] == 32 * config.num_warps:  # one channel a thread: what the chapter counts
            assert 1 <= ptx.count("fma.rn.f32") / (49 * config.kwargs["COLS"]) < 1.1
        if name.startswith("linear"): assert "wgmma" in ptx  # the matrix unit of Hopper
    assert min(spilled) == 0, spilled


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
        net.eval(), plain.eval()
        with torch.no_grad(): torch.testing.assert_close(fast(x), plain(x), rtol=1e-3, atol=1e-5)
        net.train(), plain.train()


def test_inductor_takes_an_accelerated_network():
    "A compiler that owns the products must not meet operations that want to own the weights."
    net = create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.compile(kernels.accelerate(net))(x), expected, rtol=1e-3, atol=1e-5)
