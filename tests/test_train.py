"What a notebook cell cannot host: the command in a process of its own, killed processes, full disks, downloads, the benchmarks."
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_nb.data import DataConfig, create_loaders
from convnext_nb.pretrained import read_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--epochs 3 --warmup_epochs 1 --device cpu".split()
COMMAND = [sys.executable, "-c", "from convnext_nb.train import main; main()"]


def convnext_train(*args, **kw):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=600, **kw)


def fails(*args, **kw):
    "The one line that a failing command writes."
    p = convnext_train(*args, **kw)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and p.stderr.startswith("convnext-train: error: "), (p.returncode, p.stderr)
    return p.stderr


def tree(root, parts, size, classes=("cat", "dog")):
    "An imagefolder tree of noise; the first class is darker."
    rng = np.random.default_rng(0)
    for part, n in parts.items():
        for k, c in enumerate(classes):
            (root / part / c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 100 + 155 * k // (len(classes) - 1), (*size, 3), dtype=np.uint8)).save(root / part / c / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run that was never interrupted, started by the installed console script."
    out = tmp_path_factory.mktemp("run") / "whole"
    script = Path(sys.executable).with_name("convnext-train")
    command = [script] if script.exists() else COMMAND
    p = subprocess.run([*command, *SMALL, "--out", out], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines()[-1].startswith("test accuracy ") and p.stdout.splitlines()[-1].endswith(f"run folder: {out}")
    return out


def test_run_folder(finished):
    assert sorted(p.name for p in finished.iterdir()) == ["best.safetensors", "config.json", "curves.png", "history.csv", "last.pt", "result.json"]
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == set("test_top1 best_val_top1 epochs steps images_per_s seconds seed device torch model dataset num_params".split())
    assert 0 < result["test_top1"] <= 1 and result["steps"] == 3 * 20
    assert Image.open(finished / "curves.png").size[0] > 500


def test_classify_knows_a_run(finished, tmp_path):
    "The other console script, on the weights that a run left: two folders of images, class names of the run."
    script = Path(sys.executable).with_name("convnext-classify")
    command = [script] if script.exists() else [sys.executable, "-c", "from convnext_nb.pretrained import main; main()"]
    images = tree(tmp_path, {"": 2}, (20, 30))
    p = subprocess.run([*command, images / "cat", images / "dog", "--weights", finished / "best.safetensors", "--topk", "2"], capture_output=True, text=True)
    assert p.returncode == 0 and not p.stderr, p.stderr
    assert [Path(line.split(": ")[0]).name for line in p.stdout.splitlines()] == ["0.png", "1.png"] * 2
    for line in p.stdout.splitlines():
        (a, p1), (b, p2) = (pair.split() for pair in line.split(": ")[1].split(", "))
        assert {a, b} <= set("0123456789") and 100 >= float(p1.strip("%")) >= float(p2.strip("%")) >= 0
    p = subprocess.run([*command, tmp_path / "gone.png"], capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.startswith(f"convnext-classify: error: there is no image {tmp_path}") and p.stderr.count("\n") == 1 and not p.stdout


def same(a, b):
    "Equal to the bit, but for the time it took."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "images_per_s"))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def assert_same_run(a, b):
    "Weights, average, moments, random numbers, history, best weights, result."
    for name in ("last.pt", "best.safetensors"): assert same(read_file(a / name), read_file(b / name)), name
    assert same(*(json.loads((p / "result.json").read_text()) for p in (a, b)))


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_resumed(finished, tmp_path, sig):
    out = tmp_path / "stopped"
    p = subprocess.Popen([*COMMAND, *SMALL, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not p.stdout.readline().startswith("epoch 1/3"): pass
    time.sleep(.2)  # within epoch 2
    p.send_signal(sig)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 128 + sig and "--resume" in err and "Traceback" not in err
    assert 20 <= (state := read_file(out / "last.pt"))["epoch"] * 20 + state["batch"] < 60
    assert "already holds a run" in fails(*SMALL, "--out", out)
    assert convnext_train("--out", out, "--resume").returncode == 0  # the folder knows the rest
    assert_same_run(finished, out)


SEVERAL = dict(epochs=2, warmup_epochs=1, drop_path_rate=.2, image_size=16, patch_size=2, batch_size=128, device="cpu", checkpoint_steps=2)


def train_quietly(out, steps, **kw):
    "In a process of its own: train, and count the steps."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    from convnext_nb import train as t
    real = t.train_step
    def counting(run, x, y):
        values = real(run, x, y)
        steps.value = run.step + 1
        return values
    t.train_step = counting
    try: t.train(t.TrainConfig(**SEVERAL | kw, out=str(out), resume=True))
    except t.Interrupted as e: os._exit(128 + e.args[0])


@pytest.fixture(scope="module")
def fresh_processes():
    "Processes that have everything imported, to be killed by the dozen."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convnext_nb.train", "sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot", "torch._dynamo", __name__])
    return context


@pytest.mark.parametrize("sig, times", [(signal.SIGKILL, int(os.environ.get("CONVNEXT_NB_KILLS", 40))), (signal.SIGTERM, 10)], ids=["SIGKILL", "SIGTERM"])
def test_killed_at_random_instants(fresh_processes, tmp_path, sig, times):
    "Mid-epoch, mid-evaluation, mid-write: whatever the instant, the runs end like one that was never killed. SIGTERM loses no step. (CONVNEXT_NB_KILLS=100: four minutes.)"
    def start(out):
        p = fresh_processes.Process(target=train_quietly, args=(out, steps := fresh_processes.Value("q", 0)))
        p.start()
        return p, steps
    for name in ("warm", "whole"):  # the first starts the server of processes
        began = time.monotonic()
        whole, _ = start(tmp_path / name)
        whole.join()
        assert whole.exitcode == 0
    assert_same_run(tmp_path / "warm", tmp_path / "whole")
    seconds, rng = time.monotonic() - began, np.random.default_rng(0)
    kills, run, writing, places, unfinished = 0, 0, 0, set(), False
    while kills < times or unfinished:
        out, unfinished = tmp_path / f"run{run}", True
        p, steps = start(out)
        p.join(rng.uniform(.05, .7) * seconds if kills < times else None)
        if p.is_alive():
            os.kill(p.pid, sig)
            p.join()
            kills += p.exitcode != 0
            writing += any(out.glob(".*.tmp"))
            last = read_file(out / "last.pt") if (out / "last.pt").exists() else dict(epoch=0, batch=0)
            places.add((last["epoch"], last["batch"]))
            if sig == signal.SIGTERM and p.exitcode == 128 + sig and steps.value: assert last["epoch"] * 10 + last["batch"] >= steps.value
        else: assert p.exitcode == 0
        if (out / "result.json").exists():
            assert_same_run(tmp_path / "whole", out)
            run, unfinished = run + 1, False
            shutil.rmtree(out)
    assert run >= 2 and len(places) > 5
    print(f"{kills} times in {run} runs, {writing} while a file was being written; checkpoints found: {sorted(places)}")
    if sig == signal.SIGKILL: assert writing


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


def torchrun(n, *args, **kw):
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([*TORCHRUN, str(n), "--master_port", str(free_port()), *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


TWENTY = """
import os, sys, torch
torch.set_default_dtype(torch.float64)
from convnext_nb import data, train
from torch import distributed as dist
real = data.Loader.finisher
def doubles(self):
    finish = real(self)
    def wider(b, x, i):
        x, y = finish(b, x, i)
        order.append(i[len(i) - len(x):].tolist())
        return x.double(), y.double() if y.is_floating_point() else y
    return wider
data.Loader.finisher, order = doubles, []
with train.processes("cpu") as device:
    cfg = train.TrainConfig(device="cpu", batch_size=32, mixup=.8, cutmix=1., random_erasing=.25, grad_accum_steps=int(sys.argv[2]), clip_grad=1., **eval(sys.argv[3]))
    train_dl, val_dl, _ = data.create_loaders(cfg)
    run = train.Run(cfg, train_dl.info, len(train_dl), device)
    def stop(steps):
        if run.batch == 20: raise StopIteration
    try: train.train_epoch(run, train_dl, stop)
    except StopIteration: pass
    result = train.evaluate(run.model, val_dl)
    torch.save(dict(model=run.model.state_dict(), ema=run.ema.module.state_dict(), order=order[:20], result=result, strides=[p.grad is None for p in run.model.parameters()]),
               f"{sys.argv[1]}/{run.world}_{run.rank}.pt")
os._exit(0)  # as convnext_nb.train does after a run of several processes
"""


@pytest.mark.parametrize("parts, kw", [(1, "{}"), (2, "dict(optimizer='muon')")], ids=["adamw", "muon, two parts"])
def test_two_processes_learn_what_one_learns(tmp_path, parts, kw):
    "Twenty steps in float64, everything switched on: parameters, their average, the order of the images, the evaluation."
    (tmp_path / "twenty.py").write_text(TWENTY)
    for n in (1, 2):
        p = torchrun(n, tmp_path / "twenty.py", tmp_path, parts, kw)
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err
        assert "strides" not in err  # DDP's warning that gradients do not lie as its buckets do
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert one["order"] == [a + b for a, b in zip(*(r["order"] for r in two))] and len(one["order"]) == 20
    for rank in two:
        for part in ("model", "ema"):
            for k, v in one[part].items(): assert (v - rank[part][k]).norm() <= 1e-6 * v.norm(), k
        assert rank["result"]["count"] == one["result"]["count"] == 144
        assert rank["result"]["top1"] == one["result"]["top1"] and abs(rank["result"]["loss"] - one["result"]["loss"]) < 1e-6


def test_torchrun(tmp_path):
    "The command in two processes: one run folder; stopped in the middle and resumed; a killed process ends the run; mistakes are told."
    small = ["-m", "convnext_nb.train", "--device", "cpu", "--image_size", 16, "--patch_size", 2, "--batch_size", 32, "--drop_path_rate", .1]
    whole = torchrun(2, *small, "--epochs", 1, "--out", tmp_path / "whole")
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0 and out.count("epoch 1/1") == out.count("test accuracy") == 1, err
    assert "strides" not in err
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["best.safetensors", "config.json", "curves.png", "history.csv", "last.pt", "result.json"]

    stopped = torchrun(2, *small, "--epochs", 1, "--checkpoint_steps", 5, "--out", tmp_path / "stopped")
    while not (tmp_path / "stopped" / "last.pt").exists(): time.sleep(.05)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    assert stopped.returncode and 5 <= read_file(tmp_path / "stopped" / "last.pt")["batch"] <= 40
    again = torchrun(2, *small, "--epochs", 1, "--resume", "--out", tmp_path / "stopped", "--checkpoint_steps", 5)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")

    killed = torchrun(2, *small, "--epochs", 50, "--checkpoint_steps", 5, "--out", tmp_path / "killed")
    while not (tmp_path / "killed" / "last.pt").exists(): time.sleep(.05)
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(killed.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.monotonic()
    killed.communicate(timeout=120)
    assert killed.returncode and time.monotonic() - began < 100 and not (tmp_path / "killed" / "result.json").exists()
    assert read_file(tmp_path / "killed" / "last.pt")["batch"] >= 0

    wrong = torchrun(2, *small, "--epochs", 1, "--out", tmp_path / "whole")
    _, err = wrong.communicate(timeout=120)
    assert wrong.returncode and "convnext-train: error: " in err and "already holds a run" in err


def test_workers_survive_a_signal_and_random_numbers_do_too(tmp_path):
    "Large images, decoded by workers: Ctrl-C reaches them too, and must not cost the step; resumed in mid-epoch, drop path goes on where it was."
    root = tree(tmp_path / "large", dict(train=24, val=4), (80, 100))
    args = ["--dataset", "imagefolder", "--data_dir", root, "--image_size", 96, "--batch_size", 4, "--epochs", 2, "--warmup_epochs", 0, "--num_workers", 2,
            "--val_fraction", .2, "--device", "cpu", "--drop_path_rate", .3]
    assert convnext_train(*args, "--out", tmp_path / "whole").returncode == 0
    p = subprocess.Popen([*COMMAND, *map(str, args), "--checkpoint_steps", "3", "--out", tmp_path / "stopped"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "stopped" / "last.pt").exists(): time.sleep(.02)
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err, err
    assert 0 < read_file(tmp_path / "stopped" / "last.pt")["batch"] < 9
    assert convnext_train("--out", tmp_path / "stopped", "--resume").returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_compiled_run_learns_the_same(tmp_path):
    args = "--epochs 1 --warmup_epochs 0 --device cpu --image_size 16 --patch_size 2".split()
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        p = convnext_train(*args, *more, "--out", tmp_path / name)
        assert p.returncode == 0, p.stderr
    a, b = (read_file(tmp_path / name / "last.pt") for name in ("plain", "compiled"))
    assert abs(a["history"][0]["train_loss"] - b["history"][0]["train_loss"]) < .02 and a["model"].keys() == b["model"].keys()


def test_eval_command(finished):
    script = Path(sys.executable).with_name("convnext-eval")
    command = [script] if script.exists() else [sys.executable, "-c", "from convnext_nb.train import main_eval; main_eval()"]
    p = subprocess.run([*command, finished, "--device", "cpu"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    top1 = json.loads((finished / "result.json").read_text())["test_top1"]
    assert p.stdout.startswith(f"top-1 {top1:.2%}")
    for name in ("confusion.png", "errors.png"):
        assert Image.open(finished / name).size[0] > 300
        (finished / name).unlink()


@pytest.mark.parametrize("limit_mb, name", [(1, "best.safetensors"), (20, "last.pt")])
def test_full_disk_is_one_line_and_leaves_no_debris(tmp_path, limit_mb, name):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_mb * 1_000_000,) * 2)
    err = fails(*SMALL, "--out", tmp_path / "run", preexec_fn=limit)
    assert "cannot write" in err and name in err
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert name not in left and not any(n.endswith(".tmp") for n in left)


def test_truncated_checkpoint_is_told(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text((finished / "config.json").read_text())
    (out / "last.pt").write_bytes((finished / "last.pt").read_bytes()[:1_000_000])
    assert "last.pt is cut short or damaged" in fails(*SMALL, "--out", out, "--resume")


def test_small_imagefolder(tmp_path):
    root = tree(tmp_path / "small", dict(train=40, test=10), (16, 16))
    p = convnext_train("--dataset", "imagefolder", "--data_dir", root, "--batch_size", 16, "--epochs", 4, "--warmup_epochs", 1, "--out", tmp_path / "run", "--device", "cpu")
    assert p.returncode == 0, p.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_top1"] >= .9 and result["dataset"] == "imagefolder"


def test_large_imagefolder_decodes_in_workers(tmp_path):
    root = tree(tmp_path / "large", dict(train=12, val=4), (80, 100))  # ImageNet's layout: no test/, val/ is the test set
    args = ["--dataset", "imagefolder", "--data_dir", root, "--image_size", 96, "--batch_size", 8, "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 2,
            "--val_fraction", .2, "--device", "cpu", "--rand_augment", 9, "--random_erasing", .25, "--mixup", .8, "--cutmix", 1]  # the paper's
    p = convnext_train(*args, "--out", tmp_path / "run")
    assert p.returncode == 0, p.stderr
    broken = root / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:500])
    err = fails(*args, "--out", tmp_path / "run2")
    assert "cannot read the image" in err and str(broken) in err


def test_test_images_never_train(tmp_path):
    for seed in range(3):
        loaders = create_loaders(DataConfig(seed=seed, device="cpu"))
        seen = [{im.numpy().tobytes() for im in l.images} for l in loaders]
        if seed == 0: test = seen[2]
        assert seen[2] == test and not seen[0] & test and not seen[1] & test


@pytest.fixture
def server(tmp_path):
    "A server on this machine with an archive in CIFAR-10's form, of 20 training and 10 test images."
    from torchvision.datasets import CIFAR10
    rng, files = np.random.default_rng(0), {}
    batch = lambda n: pickle.dumps({"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]})
    for name in ["data_batch_1", "test_batch"]: files[name] = batch(20 if "data" in name else 10)
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    (tmp_path / "www").mkdir()
    archive = tmp_path / "www" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, blob in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    md5 = lambda blob: hashlib.md5(blob).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    patched = dict(url=f"http://127.0.0.1:{httpd.server_address[1]}/{CIFAR10.filename}", tgz_md5=md5(archive.read_bytes()),
                   train_list=[["data_batch_1", md5(files["data_batch_1"])]], test_list=[["test_batch", md5(files["test_batch"])]],
                   meta={"filename": "batches.meta", "key": "label_names", "md5": md5(files["batches.meta"])})
    with pytest.MonkeyPatch.context() as m:
        for k, v in patched.items(): m.setattr(CIFAR10, k, v)
        yield CIFAR10
    httpd.shutdown()


def test_download(server, tmp_path):
    cfg = DataConfig(dataset="cifar10", data_dir=str(tmp_path / "data"), batch_size=5, val_fraction=.5, device="cpu")
    train, val, test = create_loaders(cfg)
    assert (train.num_samples, val.num_samples, test.num_samples) == (10, 10, 10)
    assert test.info.classes == tuple("abcdefghij")
    server.url = "http://127.0.0.1:9/"  # nothing listens; what was downloaded serves, and nothing is written
    paths = [tmp_path / "data", *(tmp_path / "data").rglob("*")]
    for path in paths: path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert create_loaders(cfg)[2].num_samples == 10
    assert {path: path.stat().st_mtime_ns for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]} == before
    for path in paths: path.chmod(0o755)


SHARE = """
import sys, torch
from torch import distributed as dist
from convnext_nb.data import DataConfig, create_loaders
dist.init_process_group("gloo")
train = create_loaders(DataConfig(dataset="imagefolder", data_dir=sys.argv[1], image_size=int(sys.argv[3]), batch_size=8, val_fraction=0, device="cpu", num_workers=1,
                                  random_erasing=.5, rand_augment=9., mixup=.8, cutmix=1.))[0]
train.set_epoch(2)
torch.save(list(train), f"{sys.argv[2]}/{dist.get_world_size()}_{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("size, image_size", [((32, 32), 32), ((80, 100), 96)], ids=["memory", "files"])
def test_processes_share_the_same_batches(tmp_path, size, image_size):
    "One, two and four processes of torch.distributed: put together, their batches are equal to the bit."
    root, whole = tree(tmp_path / "tree", dict(train=10, test=1), size), {}
    for n in (1, 2, 4):
        env = os.environ | dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")
        ranks = [subprocess.Popen([sys.executable, "-c", SHARE, root, tmp_path, str(image_size)], env=env | dict(RANK=str(r))) for r in range(n)]
        assert [p.wait(timeout=300) for p in ranks] == [0] * n
        shares = [torch.load(tmp_path / f"{n}_{r}.pt") for r in range(n)]
        whole[n] = [[torch.cat(t) for t in zip(*batch)] for batch in zip(*shares)]
    assert len(whole[1]) == 2 and whole[1][0][0].shape == (8, 3, image_size, image_size)
    for n in (2, 4):
        for a, b in zip(whole[n], whole[1]): assert all(torch.equal(u, v) for u, v in zip(a, b))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_damaged_download_is_refused(server, tmp_path):
    server.tgz_md5 = "0" * 32
    with pytest.raises(OSError, match="cannot get cifar10 into .*with no network, copy cifar-10-python.tar.gz"):
        create_loaders(DataConfig(dataset="cifar10", data_dir=str(tmp_path / "data"), device="cpu"))


def test_benchmark_and_gpu_stage_run_on_the_cpu(tmp_path):
    env = os.environ | {"TORCH_COMPILE_DISABLE": "1", "CONVNEXT_NB_CIFAR10": str(tree(tmp_path, dict(train=80, test=10), (32, 32), classes=list("abcdefghij")[:4]))}
    extra = ["--device", "cpu", "--epochs", "1", "--seeds", "1", "--name", f"try_{os.getpid()}"]
    results = ROOT / "benchmarks" / "results"
    def stage(*options):
        p = subprocess.run([sys.executable, "benchmarks/gpu.py", *options, *extra], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert p.returncode == 0, p.stderr
        assert (results / f"{extra[-1]}.png").exists()
        return json.loads((results / f"{extra[-1]}.json").read_text()), p.stdout
    try:
        r, _ = stage("cifar", "--dims", "8,16,32", "--batch_size", "16", "--warmup_epochs", "0", "--low_res_epochs", "0", "--ema_decay", ".9")
        assert list(r["summary"]) == ["cifar10-fast", "cifar10-fast, compiled", "stock, in the time of cifar10-fast", "cifar10", "cifar10, compiled"]
        assert r["torch"] == torch.__version__ and all(0 <= s["test_top1"] <= 1 and 0 <= s["test_top1_tta"] <= 1 and s["total_seconds"] > s["seconds"] for s in r["summary"].values())
        assert r["runs"][1]["config"]["compile"] and (results / f"{extra[-1]}_errors.png").exists()
        again, said = stage("best", "--dims", "8,16,32", "--depths", "1,1,1", "--batch_size", "16", "--warmup_epochs", "0", "--low_res_epochs", "0", "--ema_decay", ".9")
        assert list(again["summary"]) == [*r["summary"], "cifar10-best"] and again["runs"][:5] == r["runs"]  # it went on
        (results / f"{extra[-1]}.json").unlink()
        study = lambda minutes: stage("study", "--only", "kernels 3x3", "--minutes", minutes)
        r, said = study("9")
        assert {(s["start"], s["change"][:5], s["seeds"]) for s in r["summary"]} == {("stock", "stock", 1), ("stock", "kerne", 1), ("ours", "ours:", 1)}
        assert study("0")[0]["runs"] == r["runs"]  # nothing left to do
    finally:
        for path in results.glob(f"{extra[-1]}*"): path.unlink()
    small = ["--model", "convnext_atto", "--image_size", "32", "--batch_size", "2", "--rounds", "3"]
    try:
        p = subprocess.run([sys.executable, "benchmarks/throughput.py", *small, "--device", "cpu", *extra[-2:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert p.returncode == 0, p.stderr
        result = json.loads((results / f"{extra[-1]}.json").read_text())
        assert [(s["memory_format"], s["mode"]) for s in result["settings"]] == [(f, m) for f in ("contiguous", "channels_last") for m in ("forward", "training step")]
        for s in result["settings"]:
            assert s["networks"]["ours"]["ratio"] == 1 and s["networks"].keys() >= {"timm", "Hugging Face", "Meta's layout"}
            assert all(r["low"] <= r["ratio"] <= r["high"] for r in s["networks"].values())
        assert (results / f"{extra[-1]}.png").exists()
    finally:
        for path in results.glob(f"{extra[-1]}.*"): path.unlink()
    try:
        p = subprocess.run([sys.executable, "benchmarks/gpu.py", "data", "--device", "cpu", "--images", "600", "--rounds", "2", "--steps", "2", "--batch_size", "64", *extra[-2:]],
                           cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert p.returncode == 0, p.stderr
        settings = json.loads((results / f"{extra[-1]}.json").read_text())["settings"]
        assert settings["torchvision_over_ours"]["ratio"] > 0 and settings["waiting"]["share"] < 1
    finally:
        for path in results.glob(f"{extra[-1]}.*"): path.unlink()
    p = subprocess.run([sys.executable, "benchmarks/gpu.py", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 1 and "unknown stage 'nothing'" in p.stderr


@pytest.mark.skipif("CONVNEXT_NB_CIFAR10" not in os.environ, reason="CONVNEXT_NB_CIFAR10 names no tree of the real CIFAR-10")
def test_learns_real_cifar10(tmp_path):
    "A quarter of the training images, three epochs: far above the 10% of chance, and above what a net that sees only colours reaches."
    real = Path(os.environ["CONVNEXT_NB_CIFAR10"])
    for c in sorted(p.name for p in (real / "train").iterdir()):
        (tmp_path / "train" / c).mkdir(parents=True)
        for f in sorted((real / "train" / c).iterdir())[::4]: (tmp_path / "train" / c / f.name).symlink_to(f)
    (tmp_path / "test").symlink_to(real / "test")
    p = convnext_train("--dataset", "imagefolder", "--data_dir", tmp_path, "--patch_size", 2, "--batch_size", 64, "--epochs", 3, "--warmup_epochs", 1,
                       "--val_fraction", 0, "--device", "cpu", "--out", tmp_path / "run")
    assert p.returncode == 0, p.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_top1"] > .48  # measured: .53

    few, top1 = tmp_path / "few", {}  # a hundred other images of each class
    for c in sorted(p.name for p in (real / "train").iterdir()):
        (few / "train" / c).mkdir(parents=True)
        for f in sorted((real / "train" / c).iterdir())[1:400:4]: (few / "train" / c / f.name).symlink_to(f)
    (few / "test").symlink_to(real / "test")
    for name, more in dict(scratch=[], tuned=["--weights", tmp_path / "run" / "best.safetensors", "--layer_decay", .7]).items():
        p = convnext_train("--dataset", "imagefolder", "--data_dir", few, "--patch_size", 2, "--batch_size", 50, "--epochs", 3, "--lr", 1e-3, "--val_fraction", 0,
                           "--device", "cpu", "--out", tmp_path / name, *more)
        assert p.returncode == 0, p.stderr
        top1[name] = json.loads((tmp_path / name / "result.json").read_text())["test_top1"]
    print(top1)
    assert top1["tuned"] > top1["scratch"] + .1
