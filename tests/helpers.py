"What several tests use: the commands as processes, folders of images, runs compared to the bit."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from convnext_nb.pretrained import read_file

ROOT = Path(__file__).resolve().parent.parent
TINY = "--depths 1,1 --dims 16,32 --device cpu".split()  # what is small trains in a second
SMALL = [*TINY, "--epochs", "3", "--warmup_epochs", "1"]
COMMAND = [sys.executable, "-c", "from convnext_nb.runs import main; main()"]
IN_A_RUN = ["best.safetensors", "config.json", "curves.png", "history.csv", "last.pt",
            "result.json"]


def script(name, function):
    "The installed console script, or, where the package is not installed, what it would call."
    path = Path(sys.executable).with_name(name)
    module, _, attribute = function.partition(":")
    code = f"from convnext_nb.{module} import {attribute}; {attribute}()"
    return [str(path)] if path.exists() else [sys.executable, "-c", code]


def convnext_train(*args, **kw):
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kw)


def start(*args, **kw):
    "The command in the background."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*COMMAND, *map(str, args)], **pipes, **kw)


def fails(*args, **kw):
    "The one line that a failing command writes."
    p = convnext_train(*args, **kw)
    assert p.returncode == 2 and p.stderr.count("\n") == 1, (p.returncode, p.stderr)
    assert p.stderr.startswith("convnext-train: error: ")
    return p.stderr


def tree(root, parts, size, classes=("cat", "dog")):
    "An imagefolder tree of noise; the first class is the darkest."
    rng = np.random.default_rng(0)
    for part, n in parts.items():
        for k, c in enumerate(classes):
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                top = 100 + 155 * k // (len(classes) - 1)
                pixels = rng.integers(0, top, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / c / f"{i}.png")
    return root


def names(folder):
    "What is in a folder."
    return sorted(p.name for p in folder.iterdir())


def result(folder):
    "result.json of a run."
    return json.loads((folder / "result.json").read_text())


def same(a, b):
    "Equal to the bit, but for the time it took."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict):
        keys = [k for k in a if k not in ("seconds", "images_per_s")]
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in keys)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    "Weights, average, moments, random numbers, history, best weights, result."
    for name in ("last.pt", "best.safetensors"):
        assert same(read_file(a / name), read_file(b / name)), name
    assert same(result(a), result(b))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(n, *args, **kw):
    "torchrun in the background, n processes of one thread."
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n),
               "--master_port", str(free_port()), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, **pipes, **kw)


def benchmark(folder, name, *args, status=0, **env):
    "What a benchmark of a copy of that folder prints."
    env = os.environ | env | dict(PYTHONPATH=str(ROOT), TORCH_COMPILE_DISABLE="1")
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, args)]
    p = subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True,
                       timeout=600)
    assert p.returncode == status, p.stderr
    return p.stdout if status == 0 else p.stderr
