"Two processes on the CPU, and torchrun."
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from random import Random

import torch
from helpers import (
    IN_A_RUN,
    TINY,
    Fresh,
    assert_same_run,
    groups,
    names,
    set_environ,
    start,
    torchrun,
)
from torch import distributed as dist

from convnext_nb import checkpoints, data, processes, train
from convnext_nb.pretrained import read_file


def save_twenty_steps(out, environ):
    """In a process of its own: twenty steps in float64, everything switched on.

    With AdamW, and with Muon and two parts a step.
    """
    os.environ |= environ
    torch.set_default_dtype(torch.float64)
    real, order = data.Loader.batch_transform, []
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
        for name, kw in dict(adamw={}, muon=dict(optimizer="muon", grad_accum_steps=2)).items():
            order.clear()
            cfg = train.TrainConfig(
                device="cpu", batch_size=32, depths="1,1", dims="16,32", mixup=.8, cutmix=1.,
                random_erasing=.25, clip_grad=1., **kw)
            train_dl, val_dl, _ = data.create_loaders(cfg)
            run = train.Run(cfg, train_dl.info, len(train_dl), device)
            with suppress(StopIteration): train.train_epoch(run, train_dl, stop)
            found = dict(model=run.model.state_dict(), ema=run.ema.module.state_dict(),
                         order=order[:20], result=train.evaluate(run.model, val_dl))
            torch.save(found, out / f"{name}_{run.world}_{run.rank}.pt")
    os._exit(0)  # as convnext_nb.runs does after a run of several processes


def test_two_processes_learn_what_one_learns(tmp_path):
    "Parameters, their average, the order of the images, the evaluation."
    for n in (1, 2):
        ranks = [Fresh(save_twenty_steps, tmp_path, group) for group in groups(n)]
        for p in ranks:
            _, err = p.communicate()
            assert p.returncode == 0, err
            assert "strides" not in err  # DDP: gradients do not lie as its buckets do
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


def go_on(out, source, steps, environ):
    """In a process of its own: go on from a checkpoint if there is one, take some steps, save.

    In float64, without drop path: its random numbers are another in each number of processes.
    """
    os.environ |= environ
    torch.set_default_dtype(torch.float64)
    real = data.Loader.batch_transform
    def doubles(self):
        transform = real(self)
        return lambda *a: tuple(t.double() if t.is_floating_point() else t for t in transform(*a))
    data.Loader.batch_transform = doubles
    def stop(_):
        if run.batch == steps: raise StopIteration
    with processes.process_group("cpu", 60) as device:
        cfg = train.TrainConfig(device="cpu", batch_size=24, depths="1,1", dims="16,32", mixup=.8)
        loader = data.create_loaders(cfg)[0]
        run = train.Run(cfg, loader.info, len(loader), device)
        if source: checkpoints.load_checkpoint(source, run, loader)  # compares every field
        checkpoints.check_agreement(run)
        with suppress(StopIteration): train.train_epoch(run, loader, stop)
        checkpoints.save_checkpoint(out, run, loader)
        if run.world > 1: dist.barrier()
    os._exit(0)


def test_saved_by_four_processes_resumed_by_fewer(tmp_path):
    "One, two and three go on from the same state, to the same weights, moments and next batch."
    def members(n, name, source, steps):
        ranks = [Fresh(go_on, tmp_path / name, source, steps, group) for group in groups(n)]
        for p in ranks:
            _, err = p.communicate()
            assert p.returncode == 0, err
        return read_file(tmp_path / name)
    begun = members(4, "begun.pt", None, 5)
    assert len(begun["processes"]) == 4 and begun["batch"] == 5
    four = members(4, "4.pt", tmp_path / "begun.pt", 9)
    for n in (1, 2, 3):
        fewer = members(n, f"{n}.pt", tmp_path / "begun.pt", 9)
        assert len(fewer["processes"]) == n
        for field in ("epoch", "batch", "schedule", "next_batch", "data"):
            assert fewer[field] == four[field], field
        for k, v in four["model"].items():
            if v.is_floating_point(): assert (v - fewer["model"][k]).norm() <= 1e-9 * v.norm(), k
        for i, moments in four["optimizers"][0]["state"].items():
            other = fewer["optimizers"][0]["state"][i]
            for k, v in moments.items(): assert (v - other[k]).norm() <= 1e-7 * v.norm(), (i, k)


def several(n, *args):
    "convnext-train in n processes, as torchrun would start it; exit status and output of each."
    ranks = [start(*args, prepare=partial(set_environ, group)) for group in groups(n)]
    return [(p.communicate(), p.returncode) for p in ranks]


SMALL = [*TINY, "--image_size", 16, "--patch_size", 2, "--batch_size", 32,
         "--drop_path_rate", .1, "--checkpoint_steps", 5]


def wait_for_a_checkpoint(out):
    while not (out / "last.pt").exists(): time.sleep(.01)


def test_torchrun_is_stopped_and_goes_on(tmp_path):
    "One folder of two processes; the mistake of one is told."
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (((out, err), status), ((out1, _), status1)) = several(2, *SMALL, "--epochs", 1, "--out", whole)
    assert status == status1 == 0 and "strides" not in err, err
    assert out.count("epoch 1/1") == out.count("test accuracy") == 1 and not out1
    assert names(whole) == IN_A_RUN
    p = torchrun(2, "-m", "convnext_nb.runs", *SMALL, "--epochs", 1, "--out", stopped)
    wait_for_a_checkpoint(stopped)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=120)
    assert p.returncode and 5 <= read_file(stopped / "last.pt")["batch"] <= 40
    for (_, err), status in several(2, *SMALL, "--epochs", 1, "--resume", "--out", stopped):
        assert status == 0, err
    assert_same_run(whole, stopped)
    for (_, err), status in several(2, *SMALL, "--epochs", 1, "--out", whole):
        assert status == 2 and err.startswith("convnext-train: error: ")
        assert "already holds a run" in err


def test_torchrun_ends_with_a_killed_process(tmp_path):
    killed = tmp_path / "killed"
    p = torchrun(2, "-m", "convnext_nb.runs", *SMALL, "--epochs", 500, "--out", killed)
    wait_for_a_checkpoint(killed)
    ps = ["ps", "-o", "pid=", "--ppid", str(p.pid)]
    workers = subprocess.run(ps, capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.monotonic()
    p.communicate(timeout=120)
    assert p.returncode and time.monotonic() - began < 100
    assert not (killed / "result.json").exists()
    assert read_file(killed / "last.pt")["batch"] >= 0


KILLS = int(os.environ.get("CONVNEXT_NB_KILLS", 4))


def start_two(out):
    "Two processes of one run."
    args = [*SMALL, "--epochs", 1, "--resume", "--out", out, "--dist_timeout", 5]
    return [start(*args, prepare=partial(set_environ, group)) for group in groups(2)]


def test_one_of_two_killed_at_any_instant(tmp_path):
    """The other one ends by itself, and both go on to the end of a run that was never cut.

    CONVNEXT_NB_KILLS=100 kills a hundred times.
    """
    for p in start_two(tmp_path / "whole"):
        _, err = p.communicate()
        assert p.returncode == 0, err
    random, kills, run, statuses, longest = Random(0), 0, 0, Counter(), 0
    while kills < KILLS or run == 0:
        out = tmp_path / f"run{run}"
        ranks = start_two(out)
        if kills < KILLS:
            ranks[0].process.join(random.uniform(.3, 2.5))
            began, killed = time.monotonic(), random.randrange(2)
            if ranks[killed].process.is_alive():
                os.kill(ranks[killed].pid, signal.SIGKILL)
                kills += 1
            for p in ranks:
                _, err = p.communicate(timeout=60)
                assert "Traceback" not in err, err
            statuses[ranks[1 - killed].returncode] += 1
            longest = max(longest, time.monotonic() - began)
        else:
            for p in ranks: p.communicate(timeout=60)
        if (out / "result.json").exists():
            assert_same_run(tmp_path / "whole", out)
            shutil.rmtree(out)
            run += 1
    print(f"{kills} kills in {run} runs: statuses of the other {dict(statuses)}, "
          f"at most {longest:.1f} s until both were gone")
    assert longest < 30 and set(statuses) <= {0, 3}
