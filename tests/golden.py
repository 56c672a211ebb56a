"""The losses of a hundred steps, as a file: `python tests/golden.py` adds those of this machine.

In float64 every machine computes the same to twelve digits. In float32 a kind of machine (what its
CPU can do, and torch's version) computes the same to the bit each time, and another kind does not.
"""
import json
import platform
from pathlib import Path

import torch

from convnext_nb import data, train

FILE = Path(__file__).with_name("golden.json")
RECIPE = dict(device="cpu", batch_size=32, depths="1,1", dims="16,32", drop_path_rate=.1, mixup=.8,
              cutmix=1., random_erasing=.25, clip_grad=1., epochs=3, image_size=16, patch_size=2,
              amp_dtype="float32")


def machine():
    "Its kind, as far as the numbers depend on it: libraries choose their code by the processor."
    kind = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    info = Path("/proc/cpuinfo")  # Linux
    lines = info.read_text().splitlines() if info.exists() else []
    facts = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    kind += [facts[k] for k in ("vendor_id", "cpu family", "model") if k in facts]
    return f"{' '.join(kind)}, torch {torch.__version__.partition('+')[0]}"


def losses(dtype, steps=100):
    "In one thread: the loss of each step, everything that draws random numbers switched on."
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    try:
        cfg = train.TrainConfig(**RECIPE)
        loader = data.create_loaders(cfg)[0]
        run, found = train.Run(cfg, loader.info, len(loader), torch.device("cpu")), []
        run.model.train()
        while len(found) < steps:
            loader.set_epoch(run.epoch, 0)
            for x, y in loader:
                y = y.to(dtype) if y.is_floating_point() else y
                found.append(train.train_step(run, x.to(dtype), y)[0].item())
                run.batch += 1
            run.epoch, run.batch = run.epoch + 1, 0
        return found[:steps]
    finally: torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    golden.setdefault("float64", losses(torch.float64))
    golden.setdefault("float32", {})[machine()] = losses(torch.float32)
    FILE.write_text(json.dumps(golden, indent=0) + "\n")
    print(f"{FILE}: float64, and float32 of {', '.join(golden['float32'])}")
