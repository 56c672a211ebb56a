"""A rehearsal of CUDA without a GPU: tensors there have shapes, types and a device, but no values.

What is on the CPU is real. What is on CUDA is torch's FakeTensor, whose operations torch checks as
`torch.export` does. So a tensor on the wrong device is found here, and so is code that reads a
value from the GPU, and would wait for it. Not rehearsed: the backward pass, which wants a driver
(gradients of zeros stand in for it), the inside of the kernels (tests/test_kernels.py interprets
them), CUDA graphs, and time.
"""
import re
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import Fresh, settle, tree
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from convnext_nb import data, train
from convnext_nb.accelerate import FusedBlock, TritonBlock, accelerate
from convnext_nb.blocks import ConvNeXtBlock

aten = torch.ops.aten


class FakeCUDA(FakeTensorMode):
    "What has to do with CUDA is fake, all else real; counts how often values are asked for."
    avoid_device_init = True  # there is no driver
    inside, reads = False, 0

    def __deepcopy__(self, memo): return self  # a tensor's copy is on the same GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside: return super().__torch_dispatch__(func, types, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        to_cuda = any(isinstance(a, torch.device) and a.type == "cuda" for a in leaves)
        if not to_cuda and not any(isinstance(a, FakeTensor) for a in leaves):
            return func(*args, **kwargs)
        # two that torch does not check
        packet, devices = func.overloadpacket, {a.device for a in leaves if isinstance(a, Tensor)}
        if packet in (aten.index, aten.index_put_) and args[0].device.type == "cpu":
            raise RuntimeError("indices on cuda, and what they index on the cpu")
        if packet is aten._fused_adamw_:
            if len(devices) > 1: raise RuntimeError(f"AdamW has tensors on {devices}")
            return None
        def fake(t): return t if isinstance(t, FakeTensor) else self.from_tensor(t)
        self.inside = True
        try:
            args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally: self.inside = False

    def ones(self, t):
        "`t.tolist()`, where a GPU would be waited for."
        self.reads += 1
        return torch.ones(t.shape, dtype=t.dtype).tolist()

    def capture(self, step, run, fixed):
        "Stands in for the capture of a CUDA graph, in which nothing may be read."
        reads, fixed.graph = self.reads, SimpleNamespace(replay=lambda: None)
        fixed.values = step.update(run, fixed.x, fixed.y)
        assert self.reads == reads


def zero_gradients(optimizers):
    "Stands in for the backward pass."
    for group in (g for o in optimizers for g in o.param_groups):
        for p in group["params"]: p.grad = torch.zeros_like(p)


@contextmanager
def pretended_cuda():
    "For a process of its own: torch believes that there is a GPU."
    mode, train_step = FakeCUDA(), train.train_step
    def step(run, x, y):
        def backward(loss):
            assert loss.device.type == "cuda" and loss.requires_grad
            zero_gradients(run.optimizers)
        with patch.object(Tensor, "backward", backward): return train_step(run, x, y)
    cuda = dict(is_available=True, device_count=1, current_device=0, _lazy_init=None,
                is_bf16_supported=True, get_device_capability=(9, 0),
                get_device_properties=SimpleNamespace(shared_memory_per_block_optin=232_448))
    patches = [patch.object(torch.cuda, name, lambda *_, v=value, **__: v)
               for name, value in cuda.items()]
    patches += [patch.object(*p) for p in (
        (fake_tensor, "init_gpu_context", lambda device: None),
        (FakeTensor, "tolist", lambda t: mode.ones(t)),
        (torch.utils.data._utils.pin_memory, "pin_memory", lambda x, *_: x),
        (train, "train_step", step),
        (train, "_on_side_stream", lambda f, *args: f(*args)),
        (train.CUDAGraphedStep, "_capture", lambda *args: mode.capture(*args)))]
    with ExitStack() as stack:
        for context in [*patches, mode]: stack.enter_context(context)
        yield mode


def folder(root, **kw):
    "Configuration of a folder of images, two batches of each split."
    return dict(dataset="imagefolder", data_dir=str(root), batch_size=4, val_fraction=.2,
                num_workers=0) | kw


AUGMENTATIONS = [
    {}, dict(augment=False), dict(alternate_flip=True), dict(max_shift=1), dict(rand_augment=9.),
    dict(random_erasing=.5), dict(cutout=8), dict(low_res=16, low_res_epochs=1), dict(mixup=.8),
    dict(cutmix=1.), dict(mixup=.8, cutmix=1., rand_augment=9., random_erasing=.25, cutout=4)]


def rehearse_loaders(root, image_size, augmentations=AUGMENTATIONS, plant=None):
    "Batches of every augmentation are on the GPU, and none waits for it."
    with pretended_cuda() as mode:
        for kw in augmentations:
            cfg = data.DataConfig(**folder(root, image_size=image_size, **kw))
            for loader in data.create_loaders(cfg):
                if plant: plant(loader)
                for x, y in loader:
                    assert x.device == y.device == torch.device("cuda", 0)
                    assert (x.dtype, len(x)) == (torch.float32, len(y))
                assert mode.reads == 0, f"the GPU is asked {mode.reads} times with {kw}"


def rehearse_preset(name, root, kinds=(ConvNeXtBlock, TritonBlock, FusedBlock), plant=None):
    "An epoch, evaluation and test-time augmentation, with one block of each kind in a stage."
    kw = folder(root) if name != "digits" else dict(batch_size=512)
    depths = re.sub(r"\d+", "1", train.PRESETS[name].get("depths", "3,3,9,3"))
    cfg = train.preset(name, epochs=1, warmup_epochs=0., depths=depths, **kw)
    with pretended_cuda():
        train_dl, val_dl, test_dl = data.create_loaders(cfg)
        for kind in kinds:
            run = train.Run(cfg, train_dl.info, len(train_dl), train_dl.device)
            for model in {run.model, run.eval_model}:
                if kind is not ConvNeXtBlock: accelerate(model)
                blocks = [m for m in model.modules() if isinstance(m, ConvNeXtBlock)]
                for m in blocks: m.__class__ = kind if type(m) is FusedBlock else type(m)
                assert cfg.norm_layer == "batchnorm" or all(type(m) is kind for m in blocks)
            if plant: plant(run)
            train.fit(run, train_dl, val_dl)
            train.evaluate(run.eval_model, test_dl)
            train.evaluate(run.eval_model, test_dl, torch.bfloat16, tta=True)
            probs, labels = train.predict(run.eval_model, test_dl)
            assert probs.shape == (len(labels), len(train_dl.info.classes))


def in_rehearsal(rehearse, *args):
    "In a process of its own: what goes wrong, if anything does."
    settle()
    try: rehearse(*args)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        print(f"{type(e).__name__}: {e}")


def found(*args):
    "What a rehearsal finds."
    p = Fresh(in_rehearsal, *args)
    out, err = p.communicate()
    assert p.returncode == 0, err
    return out


def small(root): return tree(root, dict(train=10, test=2), (32, 32))
def large(root): return tree(root, dict(train=10, test=2), (40, 50))


@pytest.mark.parametrize("make, image_size", [(small, 32), (large, 96)], ids=["memory", "files"])
def test_loaders(tmp_path, make, image_size):
    assert found(rehearse_loaders, make(tmp_path / "tree"), image_size) == ""


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets(tmp_path, name):
    make = large if train.PRESETS[name].get("dataset") == "imagefolder" else small
    assert found(rehearse_preset, name, make(tmp_path / "tree")) == ""


# Planted faults: each must be found.

def images_on_cpu(loader): loader.images = torch.zeros(loader.images.shape, dtype=torch.uint8)
def labels_on_cpu(loader): loader.labels = torch.zeros(loader.num_samples, dtype=torch.long)
def mean_on_cpu(loader): loader.mean = torch.zeros(3, 1, 1)


def boxes_on_cpu(loader):
    def boxes(n, *_): return [torch.zeros(4, n, dtype=torch.long)]
    patch.object(data, "epoch_boxes", boxes).start()


def asks_for_samples(loader):
    "As RandAugment did: the samples' numbers are read from the GPU, batch by batch."
    batches = loader.batches
    loader.batches = lambda device="cpu": ((b, i) for b, i in batches(device) if i.tolist())


@pytest.mark.parametrize("plant, kw, message", [
    (images_on_cpu, {}, "indices on cuda, and what they index on the cpu"),
    (labels_on_cpu, {}, "indices on cuda, and what they index on the cpu"),
    (mean_on_cpu, {}, "same device"),
    (boxes_on_cpu, dict(cutout=4), "indices on cuda, and what they index on the cpu"),
    (asks_for_samples, dict(rand_augment=9.), "the GPU is asked "),
])
def test_planted_in_loaders(tmp_path, plant, kw, message):
    assert message in found(rehearse_loaders, small(tmp_path / "tree"), 32, [kw], plant)


def on_cpu(p): return torch.nn.Parameter(torch.zeros(p.shape))
def fc_on_cpu(run): run.model.head.fc.weight = on_cpu(run.model.head.fc.weight)
def ema_on_cpu(run): run.ema.module.head.fc.bias = on_cpu(run.ema.module.head.fc.bias)
def sums_on_cpu(run): run.sums = torch.zeros(3, dtype=torch.float64)


def gamma_on_cpu(run):
    block = run.model.stages[0].blocks[0]
    block.gamma = on_cpu(block.gamma)


@pytest.mark.parametrize("plant, kind", [
    (fc_on_cpu, ConvNeXtBlock), (ema_on_cpu, ConvNeXtBlock), (sums_on_cpu, ConvNeXtBlock),
    (gamma_on_cpu, ConvNeXtBlock), (gamma_on_cpu, TritonBlock), (gamma_on_cpu, FusedBlock)])
def test_planted_in_runs(tmp_path, plant, kind):
    args = "digits", small(tmp_path / "tree"), [kind], plant
    assert "device" in found(rehearse_preset, *args)
