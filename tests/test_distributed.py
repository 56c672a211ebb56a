"torchrun with two processes on the CPU."
import os
import signal
import subprocess
import time

import torch
from helpers import IN_A_RUN, TINY, assert_same_run, names, torchrun

from convnext_nb.pretrained import read_file

TWENTY = """
import os, sys, torch
torch.set_default_dtype(torch.float64)
from convnext_nb import data, train
real = data.Loader.batch_transform
def doubles(self):
    transform = real(self)
    def wider(b, x, i):
        x, y = transform(b, x, i)
        order.append(i[len(i) - len(x):].tolist())
        return x.double(), y.double() if y.is_floating_point() else y
    return wider
data.Loader.batch_transform = doubles

def stop(steps):
    if run.batch == 20: raise StopIteration

with data.process_group("cpu") as device:
    for name, kw in {"adamw": {}, "muon": dict(optimizer="muon", grad_accum_steps=2)}.items():
        order = []
        cfg = train.TrainConfig(
            device="cpu", batch_size=32, depths="1,1", dims="16,32", mixup=.8, cutmix=1.,
            random_erasing=.25, clip_grad=1., **kw)
        train_dl, val_dl, _ = data.create_loaders(cfg)
        run = train.Run(cfg, train_dl.info, len(train_dl), device)
        try: train.train_epoch(run, train_dl, stop)
        except StopIteration: pass
        found = dict(model=run.model.state_dict(), ema=run.ema.module.state_dict(),
                     order=order[:20], result=train.evaluate(run.model, val_dl))
        torch.save(found, f"{sys.argv[1]}/{name}_{run.world}_{run.rank}.pt")
os._exit(0)  # as convnext_nb.runs does after a run of several processes
"""


def test_two_processes_learn_what_one_learns(tmp_path):
    """Twenty steps in float64, everything switched on, AdamW, and Muon with two parts a step.

    Parameters, their average, the order of the images, the evaluation.
    """
    (tmp_path / "twenty.py").write_text(TWENTY)
    for n in (1, 2):
        p = torchrun(n, tmp_path / "twenty.py", tmp_path)
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err
        assert "strides" not in err  # DDP's warning that gradients do not lie as its buckets do
    for name in ("adamw", "muon"):
        one, *two = (torch.load(tmp_path / f"{name}_{n}.pt") for n in ("1_0", "2_0", "2_1"))
        assert one["order"] == [a + b for a, b in zip(*(r["order"] for r in two))]
        assert len(one["order"]) == 20
        for rank in two:
            for part in ("model", "ema"):
                for k, v in one[part].items():
                    assert (v - rank[part][k]).norm() <= 1e-6 * v.norm(), k
            assert rank["result"]["count"] == one["result"]["count"] == 144
            assert rank["result"]["top1"] == one["result"]["top1"]
            assert abs(rank["result"]["loss"] - one["result"]["loss"]) < 1e-6


def test_torchrun(tmp_path):
    "One folder; stopped and resumed; a killed process ends the run; mistakes are told."
    small = ["-m", "convnext_nb.runs", *TINY, "--image_size", 16, "--patch_size", 2,
             "--batch_size", 32, "--drop_path_rate", .1]
    def wait_for_a_checkpoint(out):
        while not (out / "last.pt").exists(): time.sleep(.01)

    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    p = torchrun(2, *small, "--epochs", 1, "--out", whole)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0 and out.count("epoch 1/1") == out.count("test accuracy") == 1, err
    assert "strides" not in err
    assert names(whole) == IN_A_RUN

    p = torchrun(2, *small, "--epochs", 1, "--checkpoint_steps", 5, "--out", stopped)
    wait_for_a_checkpoint(stopped)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=120)
    assert p.returncode and 5 <= read_file(stopped / "last.pt")["batch"] <= 40
    p = torchrun(2, *small, "--epochs", 1, "--resume", "--out", stopped, "--checkpoint_steps", 5)
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert_same_run(whole, stopped)

    p = torchrun(2, *small, "--epochs", 500, "--checkpoint_steps", 5, "--out", killed)
    wait_for_a_checkpoint(killed)
    ps = ["ps", "-o", "pid=", "--ppid", str(p.pid)]
    workers = subprocess.run(ps, capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.monotonic()
    p.communicate(timeout=120)
    assert p.returncode and time.monotonic() - began < 100
    assert not (killed / "result.json").exists()
    assert read_file(killed / "last.pt")["batch"] >= 0

    p = torchrun(2, *small, "--epochs", 1, "--out", whole)
    _, err = p.communicate(timeout=120)
    assert p.returncode and "convnext-train: error: " in err and "already holds a run" in err
