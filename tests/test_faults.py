"""Trainers that meet each other, and peers that fall silent: locks, signals, loaders, cables.

Real processes and signals, and, where that is allowed, two network namespaces with a cable to cut.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    SMALL,
    TINY,
    Fresh,
    assert_same_run,
    convnext_train,
    fails,
    fault_rows,
    free_port,
    groups,
    names,
    result,
    set_environ,
    start,
    told,
    torchrun,
    tree,
)

LIMIT = 5  # seconds of --dist_timeout in these tests
TWO = [*TINY, "--image_size", 16, "--patch_size", 2, "--batch_size", 32, "--drop_path_rate", .1,
       "--checkpoint_steps", 5, "--dist_timeout", LIMIT]


def wait_until(condition, seconds=60):
    "Until it is true."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(.01)
    return found


def slowly(seconds, *functions):
    "In a process of its own: each training step takes so long at least."
    from convnext_nb import train
    for f in functions: f()
    real = train.train_step
    def step(*args):
        time.sleep(seconds)
        return real(*args)
    train.train_step = step


def started(out):
    "The first checkpoint of a run is there."
    return wait_until((out / "last.pt").exists, 200)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_trainer_is_told_who_holds_the_folder(tmp_path, sig):
    "And may begin as soon as the first is gone, however it went."
    out = tmp_path / "run"
    first = start(*SMALL, "--checkpoint_steps", 1, "--out", out, prepare=partial(slowly, .05))
    started(out)
    before = (out / "config.json").read_bytes(), names(out)
    err = fails(*SMALL, "--checkpoint_steps", 1, "--out", out, "--resume")
    assert re.search(rf"process {first.pid} on \S+, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d, trains "
                     rf"in {out}; wait for it or stop it, or choose another --out", err), err
    told("Folders of runs", "another trainer is at work in it", err)
    err = fails(*SMALL, "--out", out)
    assert "already holds a run" in err
    told("Folders of runs", "a run in it, and no --resume", err)
    assert (out / "config.json").read_bytes() == before[0]
    os.kill(first.pid, sig)
    first.communicate(timeout=60)
    assert convnext_train("--out", out, "--resume").returncode == 0
    assert not {".lock", ".holder.json"} & set(names(out))


def test_workers_of_a_killed_trainer_do_not_keep_the_lock(tmp_path):
    "Processes that decode images outlive it by some seconds."
    root = tree(tmp_path / "large", dict(train=24, val=4), (80, 100))
    args = [*TINY, "--dataset", "imagefolder", "--data_dir", root, "--image_size", 96,
            "--batch_size", 4, "--epochs", 2, "--warmup_epochs", 0, "--num_workers", 1]
    p = start(*args, "--checkpoint_steps", 1, "--out", tmp_path / "run",
              prepare=partial(slowly, .1))
    started(tmp_path / "run")
    os.kill(p.pid, signal.SIGKILL)
    p.process.join()
    for pipe in (p.stdout, p.stderr): pipe.close()  # which the workers still hold
    p = convnext_train("--out", tmp_path / "run", "--resume")
    assert p.returncode == 0, p.stderr


def test_evaluation_needs_no_lock(finished, tmp_path):
    from convnext_nb.checkpoints import lock_folder
    from convnext_nb.reports import evaluate_run
    copy = shutil.copytree(finished, tmp_path / "run")
    with lock_folder(copy): assert evaluate_run(copy, device="cpu")["count"] == 360


def in_a_read_only_folder(folder):
    "In a process of its own: nobody may write into the folder, not even root."
    from convnext_nb.runs import make_parser
    make_parser()  # all that it imports, which only root may be able to read
    folder.chmod(0o555)
    if os.geteuid() == 0:  # whom no mode stops
        os.setgroups([])
        os.setuid(65534)


def test_a_read_only_folder_is_one_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out = Path(folder) / "run"
        out.mkdir()
        err = fails(*SMALL, "--out", out, prepare=partial(in_a_read_only_folder, out))
    assert f"cannot write and lock {out}: Permission denied; choose" in err
    told("Folders of runs", "read only", err)


def several(n, *args, prepare=None):
    "convnext-train in n processes, as torchrun would start it."
    return [start(*args, prepare=partial(prepare_member, group, prepare)) for group in groups(n)]


def slow_member(rank): slowly(.05)


def prepare_member(group, prepare):
    set_environ(group)
    if prepare: prepare(int(group["RANK"]))


def ends(p, began, seconds=3 * LIMIT):
    "Exit status, the last line on stderr, and the seconds that it took."
    _, err = p.communicate(timeout=seconds + 60)
    took = time.monotonic() - began
    assert took < seconds, f"{took:.0f} s: {err}"
    return p.returncode, (err.strip().splitlines() or [""])[-1], took


def check_last_words(line, out, world=2):
    "Where it stopped, what is saved, how to go on."
    assert line.startswith("convnext-train: error: stopped at step "), line
    assert re.search(r"; the last checkpoint is of step \d+; to go on: torchrun "
                     rf"--nproc_per_node {world} .*-m convnext_nb.runs --out {out} --resume$", line)


def to_the_end(out, epochs):
    "Two processes that nothing happens to begin the run, or go on with it."
    for p in several(2, *TWO, "--epochs", epochs, "--resume", "--out", out):
        _, err = p.communicate()
        assert p.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return to_the_end(tmp_path_factory.mktemp("two") / "whole", 1)


def resumed_is_the_same(whole, out, epochs=1): assert_same_run(whole, to_the_end(out, epochs))


@pytest.mark.parametrize("fault", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_gone(tmp_path, whole, fault, rank):
    "The other one ends in time and says which one it was; the run goes on to the same end."
    out = tmp_path / "run"
    ranks = several(2, *TWO, "--epochs", 1, "--out", out, prepare=slow_member)
    started(out)
    began = time.monotonic()
    os.kill(ranks[rank].pid, getattr(signal, fault))
    status, line, took = ends(ranks[1 - rank], began)
    print(f"{fault} of process {rank}: {took:.1f} s, {line}")
    assert status == 3
    check_last_words(line, out)
    assert f"process {rank}" in line and ("no sign of life" in line or "out of reach" in line)
    if fault == "SIGSTOP": told("Several processes, status 3", f"{fault} of process {rank}", line)
    with suppress(ProcessLookupError): os.kill(ranks[rank].pid, signal.SIGKILL)
    ranks[rank].communicate()
    if fault == "SIGSTOP": resumed_is_the_same(whole, out)  # SIGKILL: in test_distributed


def hang_in_the_loader(rank):
    "In a process of its own: after a few steps the second one gets no more batches."
    from convnext_nb import data
    slowly(.05)
    real = data.MemoryLoader.__iter__
    def batches(self):
        for b, batch in enumerate(real(self)):
            if self.train and b == 12 and rank == 1: time.sleep(600)
            yield batch
    data.MemoryLoader.__iter__ = batches


def test_a_loader_that_hangs(tmp_path, whole):
    "Each of the two says what it is, though only one of them hangs."
    out = tmp_path / "run"
    ranks = several(2, *TWO, "--epochs", 1, "--out", out, prepare=hang_in_the_loader)
    started(out)
    began = time.monotonic()
    for p in ranks:
        status, line, took = ends(p, began)
        print(f"hanging loader: {took:.1f} s, {line}")
        assert status == 3
        check_last_words(line, out)
        assert "the loader" in line
        line = line.replace("ended: the loader has given nothing", "waited for the loader")
        who = "the other one" if "process 1 on" in line else "the process itself"
        told("Several processes, status 3", f"a loader that hangs: {who}", line)
    resumed_is_the_same(whole, out)


def children(pid):
    ps = ["ps", "-o", "pid=", "--ppid", str(pid)]
    return [int(p) for p in subprocess.run(ps, capture_output=True, text=True).stdout.split()]


def test_torchrun_restarts_by_itself(tmp_path, whole):
    "A process is killed; torchrun starts both again, and they go on from the checkpoint."
    out = tmp_path / "run"
    p = torchrun(2, "--max-restarts", 3, "-m", "convnext_nb.runs", *TWO, "--epochs", 1,
                 "--resume", "--out", out)
    started(out)
    os.kill(children(p.pid)[-1], signal.SIGKILL)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    assert_same_run(whole, out)


def ip(*args): subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def cable():
    "Two network namespaces that a cable joins; their names, and the address of the first."
    a, b = (f"cnb{os.getpid()}{side}" for side in "ab")
    if not shutil.which("ip"): pytest.skip("no command `ip`, to make namespaces with")
    try:
        for name in (a, b): ip("netns", "add", name)
        ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
        for name, address in ((a, "10.77.0.1/24"), (b, "10.77.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", name)
            for device in (name, "lo"): ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as e:
        for name in (a, b): subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces are not allowed here: {e.stderr.decode().strip()}")
    yield a, b, "10.77.0.1"
    for name in (a, b): ip("netns", "del", name)


def test_a_cable_that_is_cut(tmp_path, cable):
    "torchrun on two machines; the link between them goes down in the middle of an epoch."
    *machines, address = cable
    out, port, sides = tmp_path / "run", free_port(), []
    for node, name in enumerate(machines):
        command = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}",
                   sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank",
                   str(node), "--master_addr", address, "--master_port", str(port),
                   "--nproc_per_node", "1", "-m", "convnext_nb.runs", *map(str, TWO),
                   "--epochs", "4", "--out", str(out)]
        env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        sides.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE))
    started(out)
    ip("-n", machines[1], "link", "set", machines[1], "down")
    began, lines = time.monotonic(), []
    for p in sides:
        _, err = p.communicate(timeout=120)
        took = time.monotonic() - began
        said = [line for line in err.splitlines() if line.startswith("convnext-train: error: ")]
        lines += said
        print(f"cut: {took:.1f} s, {said}")
        assert p.returncode and took < 6 * LIMIT, err
        assert len(said) == 1 and "--nnodes 2" in said[0], err
    assert "process 1 on" in lines[0] and "process 0" in lines[1], lines
    assert all("; the last checkpoint is of step" in line for line in lines)
    for side, line in enumerate(lines):
        told("Several processes, status 3", f"a cable that is cut: machine {side}", line)
    assert not (out / "result.json").exists()
    resumed_is_the_same(to_the_end(tmp_path / "whole", 4), out, 4)


def test_a_silent_loader_is_told_while_it_is_silent(tmp_path):
    "One process, ten usual steps and five seconds; then it goes on, and nothing is lost."
    out = tmp_path / "run"
    p = convnext_train(*TINY, "--epochs", 1, "--out", out, prepare=pause_in_the_loader)
    assert p.returncode == 0, p.stderr
    said = [line for line in p.stdout.splitlines() if line.startswith("step ")]
    line, = said
    assert re.match(
        r"step 9 has taken [5-7] s so far, usually [\d.e-]+ s; it waits for the loader$", line)
    told("One process", "a loader that gives nothing for a while", f"it goes on, and says: {line}")
    assert p.stdout.index("step 9") < p.stdout.index("epoch 1/1")


def pause_in_the_loader():
    from convnext_nb import data
    real = data.MemoryLoader.__iter__
    def batches(self):
        for b, batch in enumerate(real(self)):
            if self.train and b == 8: time.sleep(7)
            yield batch
    data.MemoryLoader.__iter__ = batches


def events(p): return [json.loads(line) for line in p.stdout.splitlines()]


def test_json_for_a_scheduler(tmp_path):
    "Every line of stdout is an object, whatever happens; the statuses are those of the table."
    out = tmp_path / "run"
    args = [*SMALL, "--log_format", "json", "--out", out]
    p = start(*args, prepare=partial(slowly, .02))
    started(out)
    os.kill(p.pid, signal.SIGTERM)
    stdout, _ = p.communicate()
    last = json.loads(stdout.splitlines()[-1])
    assert p.returncode == 143 and last["event"] == "stopped" and last["signal"] == 15
    p = convnext_train("--out", out, "--resume")
    assert p.returncode == 0
    found = [e["event"] for e in events(p)]
    assert found[0] == "data" and found[-1] == "result" and "start" in found
    assert found.count("epoch") == found.count("checkpoint") >= 1
    assert events(p)[-1]["test_top1"] == result(out)["test_top1"]
    p = convnext_train(*args)
    (error,) = events(p)
    assert p.returncode == error["status"] == 2 and "already holds a run" in error["text"]
    assert p.stderr == f"convnext-train: error: {error['text']}\n"


OPTIONS = """--dataset digit
--dataset imagefolder --data_dir nowhere
--data_dir missing --dataset imagefolder --extend gone
--batch_size 5000
--batch_size 0
--batch_size many
--val_fraction 1
--val_fraction -1
--seed -1
--image_size 0
--crop_pct 0
--mixup -1
--cutmix -1
--rand_augment 11
--random_erasing 2
--low_res 0
--num_workers -1
--device tpu
--device cuda:x
--model convnext_tinny
--depths 2;4
--dims 0
--kernel_size 0
--patch_size 8
--patch_size -1
--mlp_ratio 0
--norm_layer groupnorm
--drop_path_rate 2
--init_std -1
--weights gone.safetensors
--weights convnext_huge.fb_in1k
--weights README.md
--epochs many
--epochs 0
--optimizer sgd
--schedule step
--lr 0
--lr nan
--lr 1e6
--min_lr -1
--learning_rate 1
--warmup_epochs 50
--weight_decay -1
--layer_decay 0
--label_smoothing 1
--clip_grad 0
--ema_decay 1
--amp_dtype half
--grad_accum_steps 0
--checkpoint_steps -1
--dist_timeout 0
--log_format xml
--preset imagenet
--resume
--extend gone
--out finished
--out finished --resume --lr 1
--out finished --resume --epochs 9
--out finished --extend finished
--out other --extend finished --dims 8,16
--out other --extend finished --optimizer muon
--out truncated --resume
--out no_config --resume
--out a_file
--out /proc/run""".splitlines()


def all_mistakes(folder, out):
    "In a process of its own: exit status and stderr of each command line."
    import io
    from contextlib import redirect_stderr, redirect_stdout

    from convnext_nb.runs import main
    os.chdir(folder)
    found = {}
    for i, line in enumerate(OPTIONS):
        own = [] if "--out" in line or line == "--resume" else ["--out", f"mistake{i}"]
        device = [] if "--device" in line else ["--device", "cpu"]
        with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
            try: status = main([*own, *device, *line.split()])
            except SystemExit as e: status = e.code
        found[line] = status, err.getvalue().split("\r")[-1]
    out.write_text(json.dumps(found))


def test_mistakes_in_options(finished, tmp_path):
    "Each gets status 2 and one line that names it, and leaves nothing behind."
    folder = tmp_path / "here"
    for name in ("finished", "truncated", "no_config"): shutil.copytree(finished, folder / name)
    for name in ("truncated", "no_config"): (folder / name / "result.json").unlink()
    last = folder / "truncated" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    (folder / "no_config" / "config.json").unlink()
    for name in ("a_file", "README.md"): (folder / name).write_text("{}")
    before = names(folder), {p.name: p.read_bytes() for p in (folder / "finished").iterdir()}
    p = Fresh(all_mistakes, folder, tmp_path / "found.json")
    _, err = p.communicate()
    assert p.returncode == 0, err
    for line, (status, err) in json.loads((tmp_path / "found.json").read_text()).items():
        assert status == 2 and err.count("\n") == 1, (line, status, err)
        assert err.startswith("convnext-train: error: "), (line, err)
        told("Options, status 2", f"`{line}`", err)
    left = [n for n in names(folder) if n not in before[0]]
    assert left == [f"mistake{OPTIONS.index('--lr 1e6')}"], left  # it began to train
    assert {p.name: p.read_bytes() for p in (folder / "finished").iterdir()} == before[1]


def test_the_table_is_long_enough():
    assert sum(map(len, fault_rows().values())) >= 60
