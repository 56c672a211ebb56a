"What several tests use: the commands as processes, folders of images, runs compared to the bit."
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from convnext_nb.pretrained import read_file

ROOT = Path(__file__).resolve().parent.parent
TINY = "--depths 1,1 --dims 16,32 --device cpu".split()  # what is small trains in a second
SMALL = [*TINY, "--epochs", "3", "--warmup_epochs", "1"]
IN_A_RUN = ["best.safetensors", "config.json", "curves.png", "history.csv", "last.pt",
            "result.json"]


def script(name, function):
    "The installed console script, or, where the package is not installed, what it would call."
    path = Path(sys.executable).with_name(name)
    module, _, attribute = function.partition(":")
    code = f"from convnext_nb.{module} import {attribute}; {attribute}()"
    return [str(path)] if path.exists() else [sys.executable, "-c", code]


# Processes that are forked with everything imported: seconds less for each of a hundred.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([
    "convnext_nb.runs", "sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot",
    "torch._dynamo", "torchvision.transforms.v2", "torchvision.datasets", "helpers"])


def settle():
    "First thing in a fresh process: one thread, and workers started as they are by default."
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)


def call(stdout, stderr, function, args):
    "In a fresh process: a function that prints into two pipes."
    for fd, pipe in ((1, stdout), (2, stderr)): os.dup2(pipe.detach(), fd)
    settle()
    function(*args)


class Fresh:
    "A function in a fresh process; used like `subprocess.Popen`."
    def __init__(self, function, *args):
        out, err = os.pipe(), os.pipe()
        pipes = DupFd(out[1]), DupFd(err[1])
        self.process = FRESH.Process(target=call, args=(*pipes, function, args))
        self.process.start()
        for fd in (out[1], err[1]): os.close(fd)
        self.pid, self.stdout, self.stderr = self.process.pid, open(out[0]), open(err[0])

    def communicate(self, timeout=600):
        written = {}
        def read(pipe):
            with pipe: written[pipe] = pipe.read()
        readers = [Thread(target=read, args=[pipe]) for pipe in (self.stdout, self.stderr)]
        for t in readers: t.start()
        self.process.join(timeout)
        if self.process.is_alive(): self.process.kill()
        for t in readers: t.join()
        self.process.join()
        self.returncode = self.process.exitcode
        return written[self.stdout], written[self.stderr]


def train_main(args, prepare):
    "The command `convnext-train`."
    from convnext_nb.runs import main
    if prepare: prepare()
    main(args)


def start(*args, prepare=None):
    "convnext-train in the background; `prepare` is called first, in its process."
    return Fresh(train_main, [*map(str, args)], prepare)


def convnext_train(*args, **kw):
    "The command to its end."
    p = start(*args, **kw)
    out, err = p.communicate()
    return subprocess.CompletedProcess(args, p.returncode, out, err)


def set_environ(values): os.environ.update(values)


def groups(n):
    "The environments of n processes, as torchrun sets them."
    shared = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [shared | dict(RANK=str(r), LOCAL_RANK=str(r)) for r in range(n)]


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


def run_script(path, args, environ):
    "A benchmark, and, if it is gpu.py, the scripts that it starts: all in this process."
    real = subprocess.run
    def run(command, env=(), **kw):
        if command[0] != sys.executable: return real(command, **kw)
        os.environ.update(env)
        sys.argv = command[1:]
        runpy.run_path(command[1], run_name="__main__")
    torch._dynamo.config.disable = True
    sys.path.insert(0, str(path.parent))
    os.chdir(path.parent.parent)
    with patch("subprocess.run", run): run([sys.executable, str(path), *args], environ)


def benchmark(folder, name, *args, status=0, **environ):
    "What a benchmark of a copy of that folder prints."
    p = Fresh(run_script, folder / f"{name}.py", [*map(str, args)], environ)
    out, err = p.communicate()
    assert p.returncode == status, err
    return out if status == 0 else err


FAULTS = ROOT / "tests" / "faults.md"
HEAD = """# Faults and bad input, and what each of them gets

Written by the tests, each of which has seen what its row says: `rm tests/faults.md`, then
`CONVNEXT_NB_FAULTS=1 make test`. Without the variable they compare. N stands for numbers that vary,
... for folders.
"""


def fault_rows():
    "Section -> fault -> what it gets."
    sections = {}
    for line in FAULTS.read_text().splitlines() if FAULTS.exists() else []:
        if line.startswith("## "): rows = sections.setdefault(line[3:], {})
        elif line.startswith("| ") and line != "| fault | gets |":
            fault, gets = line[2:-2].split(" | ")
            rows[fault] = gets
    return sections


def told(section, fault, gets):
    "A row of faults.md that a test has just seen: it is there, or it is written."
    gets = gets.replace("convnext-train: error: ", "").replace(socket.gethostname(), "HOST")
    gets = gets.strip()
    gets = re.sub(r"(?<![\w.])/(?!(?:proc|dev)/)[^\s;,:'\"]*/(?=[^\s;,:'\"/]+)", ".../", gets)
    for pattern in (r"process (\d{3,})", r"([\d.e-]*\d) s\b", r"step (\d+)",
                    r"since ([-\d]+ [:\d]+)", r"cc:(\d+)", r"pos (\d+)",
                    r"vs (\d+)", r"port (\d+)"):
        gets = re.sub(pattern, lambda m: m[0].replace(m[1], "N"), gets)
    fault, gets = (text.replace("|", "\\|") for text in (fault, gets))
    if "CONVNEXT_NB_FAULTS" not in os.environ:
        assert fault_rows().get(section, {}).get(fault) == gets, f"{fault}: {gets}"
        return
    with FileLock(FAULTS.with_suffix(".lock")):
        sections = fault_rows()
        sections.setdefault(section, {})[fault] = gets
        text = HEAD
        for name, rows in sorted(sections.items()):
            table = "".join(f"| {k} | {v} |\n" for k, v in sorted(rows.items()))
            text += f"\n## {name}\n\n| fault | gets |\n|---|---|\n{table}"
        FAULTS.write_text(text)
