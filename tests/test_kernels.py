"What no notebook can show of the kernels: a GPU that is not there, torch.compile, and no Triton."
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, result

from convnext_nb import accelerate as accelerating
from convnext_nb import kernels, mlp
from convnext_nb.accelerate import CPUBlock, FusedBlock, TritonBlock, TritonNorm2d, accelerate
from convnext_nb.blocks import ConvNeXtBlock, LayerNorm2d
from convnext_nb.model import create_model

SIZES = dict(C=384, K=7, ACC=getattr(kernels.tl, "float32", None))
NORM, LONG = SIZES | dict(CHANNELS=512), SIZES | dict(C=1536, CHANNELS=2048)
FC1 = dict(I=384, O=1536, GELU=True, HALF=True)
FC2 = dict(I=1536, O=384, GELU=False, HALF=True)
MLP = SIZES | dict(C=96, O=384, HALF=True, PART=32, PARTS=3)
WIDE = MLP | dict(C=192, O=768, PART=64)
KERNELS = {  # constants, and what points to float32; other pointers are to bfloat16
    "conv_kernel": (SIZES | dict(plus=None), "taps bias"),
    "conv_kernel plus": (SIZES, "taps bias"),
    "conv_weight_kernel": (SIZES, "out"),
    "norm_kernel": (NORM, "w b"), "norm_grad_kernel": (NORM, "w out"),
    "norm_grad_kernel 1536": (LONG, "w out"),
    "gelu_kernel": (SIZES, "b"), "gelu_grad_kernel": (SIZES, "b out"),
    "residual_kernel": (SIZES, "b gamma drop_mask"),
    "residual_grad_kernel": (SIZES, "b gamma drop_mask out"),
    "mlp_kernel": (MLP | dict(drop_mask=None), "norm_w norm_b b1 b2 gamma"),
    "mlp_kernel 192": (WIDE | dict(drop_mask=None), "norm_w norm_b b1 b2 gamma"),
    "mlp_grad_kernel": (MLP, "norm_w norm_b b1 gamma out"),
    "mlp_grad_kernel 192": (WIDE, "norm_w norm_b b1 gamma out"),
    "linear_kernel fc1": (SIZES | FC1, "b gamma"), "linear_kernel fc2": (SIZES | FC2, "b gamma")}

FEW = {"mlp_grad_kernel 192": 16}  # bytes that do not matter: four registers


def usage(kernel, constants, floats, config, path):
    "Bytes that a thread of `kernel` keeps or spills outside its registers on Hopper, and PTX."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    kind = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(floats.split(), "*fp32")
    kind |= dict.fromkeys("H W N P D rows splits pixels".split(), "i32") | dict(eps="fp32")
    kind = {k: "constexpr" if k in constants else kind[k] for k in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, k) in enumerate(kind.items())
               if k[0] == "*" or name == "D"}
    source = ASTSource(kernel, kind, constants, aligned)
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    binary = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    path.write_bytes(binary.asm["cubin"])
    command = [cuobjdump, "--dump-resource-usage", path]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("STACK", "LOCAL"))
    return stack, local, binary.asm["ptx"]


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper_and_need_not_spill(name, tmp_path):
    (constants, floats), allowed, spilled = KERNELS[name], FEW.get(name, 0), []
    name = name.split()[0]
    kernel = getattr(kernels, name, None) or getattr(mlp, name)
    for config in kernel.configs:
        sizes, path = config.kwargs, tmp_path / "kernel.cubin"
        stack, local, ptx = usage(kernel.fn, constants | sizes, floats, config, path)
        spilled.append(stack + local)
        # one channel a thread: what the chapter counts
        if name == "conv_kernel" and sizes["CHANNELS"] == 32 * config.num_warps:
            assert 1 <= ptx.count("fma.rn.f32") / (49 * sizes["COLS"]) < 1.1
        if name.startswith(("linear", "mlp")): assert "wgmma" in ptx  # Hopper's
    assert min(spilled) <= allowed, spilled


def small_network(**how):
    return create_model("convnext_tiny", depths=(1, 1), dims=(8, 16), num_classes=5, **how)


@pytest.mark.parametrize("cls", [TritonBlock, FusedBlock, CPUBlock])
def test_torch_compile_takes_them_whole(cls):
    torch.manual_seed(0)
    net = small_network()
    plain = deepcopy(net)
    for m in net.modules():
        if type(m) is ConvNeXtBlock: m.__class__ = cls
        if type(m) is LayerNorm2d and cls is not CPUBlock: m.__class__ = TritonNorm2d
    fast = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, size in ((2, 32), (3, 48)):
        x = torch.randn(n, 3, size, size)
        grads = []
        for f in (fast, plain):
            out = f(x)
            grads.append([out, *torch.autograd.grad(out.square().sum(), f.parameters())])
        for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        net.eval(), plain.eval()
        with torch.no_grad(): torch.testing.assert_close(fast(x), plain(x), rtol=1e-3, atol=1e-5)
        net.train(), plain.train()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", [{}, dict(use_grn=True, ls_init_value=None)])
def test_inductor_takes_an_accelerated_network(frozen, how):
    "A compiler that owns the products must not meet operations that want to own the weights."
    torch.compiler.reset()
    plain, x = small_network(**how).eval().requires_grad_(not frozen), torch.randn(2, 3, 64, 64)
    net, before = accelerate(deepcopy(plain)), len(accelerating._PACKED)
    compiled = torch.compile(net)
    with torch.no_grad():
        for _ in range(2):  # once more when the weights have changed
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-3, atol=1e-5)
            for p in (*plain.parameters(), *net.parameters()): p.mul_(1.1)
    if accelerating._LINEAR_POINTWISE:  # both layers of both blocks
        assert len(accelerating._PACKED) - before == 4 * frozen


@pytest.mark.skipif(not accelerating._LINEAR_POINTWISE, reason="needs oneDNN")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("act", ["gelu", "none"])
def test_opcheck(frozen, act):
    "PyTorch's own checks of an operation that was registered with it."
    shortcut = torch.randn(2, 3, 5, 8) if act == "none" else None
    weight, bias = (torch.nn.Parameter(torch.randn(s), not frozen) for s in ((8, 4), (8,)))
    args = torch.randn(2, 3, 5, 4), weight, bias, act, shortcut
    with torch.no_grad(): torch.library.opcheck(accelerating._compiled_linear, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_adds_in_float32(dtype):
    "torch's own stops at 256 on a CPU, bfloat16's first whole number without a next."
    params = [torch.ones(8, requires_grad=True) for _ in range(2)]
    y = kernels.layer_norm(torch.randn(2000, 8, dtype=dtype), *params, 1e-6)
    shift = torch.autograd.grad(y, params, torch.ones_like(y))[1]
    assert y.dtype == dtype and (shift == 2000).all()


def without_triton(code):
    "Run `code` in a process where Triton cannot be imported."
    code = "import sys; sys.modules['triton'] = None\n" + code
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                       timeout=600)
    assert p.returncode == 0, p.stderr
    return p


OPERATIONS = """
import torch, torch.nn.functional as F
from torch import randn
from torch.testing import assert_close
from convnext_nb import kernels as k
assert k.triton is None and not k.INTERPRETED
torch.manual_seed(0)
x, y, drop_mask = randn(2, 5, 6, 8), randn(2, 5, 6, 8), torch.tensor([0., 2.])
w, a, b = randn(8, 1, 3, 3), randn(8), randn(8)
m = drop_mask.view(-1, 1, 1, 1)
def conv(x, w, b):
    return F.conv2d(x.permute(0, 3, 1, 2), w, b, padding=1, groups=8).permute(0, 2, 3, 1)
for f, plain, args in (
        (k.depthwise_conv, conv, (x, w, b)),
        (k.layer_norm, lambda x, a, b: F.layer_norm(x, (8,), a, b, 1e-6), (x, a, b)),
        (k.bias_gelu, lambda x, b: F.gelu(x + b), (x, b)),
        (lambda *args: k.scale_residual(*args, drop_mask),
         lambda x, y, b, a: x + m * a * (y + b), (x, y, b, a))):
    args = [t.clone().requires_grad_() for t in args]
    out, expected = f(*args), plain(*args)
    assert_close(out, expected)
    up = torch.randn_like(out)
    for p, q in zip(torch.autograd.grad(out, args, up), torch.autograd.grad(expected, args, up)):
        assert_close(p, q, rtol=1e-4, atol=1e-4)
w, b4, a4 = randn(4, 8), randn(4), randn(4)
assert_close(k.linear_gelu(x, w, b4), F.gelu(F.linear(x, w, b4)))
shortcut = randn(2, 5, 6, 4)
assert_close(k.linear_residual(x, w, b4, a4, shortcut), shortcut + a4 * F.linear(x, w, b4))
for name in ("gelu_kernel", "conv_kernel"):
    try: k.launch(getattr(k, name), (1,), x)
    except ImportError as e: print(e)
k.INTERPRETED = True  # as if every tensor were on a GPU
x.requires_grad_()
w = randn(8, 1, 3, 3)
for f, args in ((k.bias_gelu, (x, b)), (k.layer_norm, (x, a, b)), (k.depthwise_conv, (x, w, b)),
                (k.scale_residual, (x, x, a, b)), (k.linear_gelu, (x.detach(), randn(4, 8), b4))):
    try: f(*args)
    except ImportError as e: print(e)
"""


def test_operations_without_triton():
    "Plain PyTorch on a CPU; where a kernel is needed, one line says what is missing."
    said = without_triton(OPERATIONS).stdout.splitlines()
    names = "gelu conv gelu norm conv residual linear".split()
    advice = "needs Triton; pip install triton on Linux, triton-windows on Windows"
    assert said == [f"{name}_kernel {advice}" for name in names]


ACCELERATE = """
import torch
from convnext_nb import accelerate as module
from convnext_nb.accelerate import *
from convnext_nb.model import create_model
net = create_model("convnext_tiny", depths=(1, 1), dims=(8, 16), num_classes=5)
x = torch.randn(2, 3, 64, 64)
kinds = lambda: sorted({type(m).__name__ for m in net.modules() if "Block" in type(m).__name__})
logits = net(x)
accelerate(net)
print(*kinds())
torch.testing.assert_close(net(x), logits, rtol=1e-3, atol=1e-5)
net(x).sum().backward()
accelerate(net, x), restore(net)
module._device = lambda m: torch.device("cuda")
accelerate(net)
print(*kinds())
"""


def test_accelerate_without_triton():
    "It works on a CPU; on CUDA the blocks stay plain, and a warning says so."
    p = without_triton(ACCELERATE)
    assert p.stdout.split() == ["CPUBlock", "ConvNeXtBlock"]
    assert p.stderr.count("Warning") == 1
    assert "the blocks on CUDA stay plain: accelerate needs Triton; pip install" in p.stderr


def test_training_without_triton(tmp_path):
    "The command imports nothing that needs Triton."
    args = [*SMALL[:-4], "--epochs", "1", "--warmup_epochs", "0", "--out", str(tmp_path / "run")]
    without_triton(f"import convnext_nb.runs; convnext_nb.runs.main({args!r})")
    assert result(tmp_path / "run")["epochs"] == 1
