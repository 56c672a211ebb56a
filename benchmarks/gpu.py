"""Everything that needs a GPU, in stages of at most 9 minutes: python benchmarks/gpu.py STAGE
(or: make gpu STAGE=...)

    test    every notebook with its `slow` and `cuda` cells but chapters 06 and 07, then pytest
    triton  chapters 06 and 07 with these cells: every kernel compiled, tuned, and beside PyTorch
    bench   convnext_tiny, accelerated too, beside timm, torchvision, Hugging Face, Meta's layout
            and the hardware, launched by Python and as a CUDA graph: benchmarks/throughput.py
    compile the same under torch.compile, channels_last alone, without Meta's layout; what it
            compiled stays in torch's cache, so if its time runs out, call it again
    kernels the Triton kernels beside PyTorch, stage by stage: benchmarks/kernels.py
    data    batches from memory beside torchvision's, and how long a training step waits for them:
            benchmarks/data.py
    cifar   CIFAR-10 from scratch at full scale: benchmarks/cifar10.py, the presets cifar10-fast and
            cifar10 with eight seeds each
    best    the preset cifar10-best, three seeds, one or more at a time
    study   one change at a time: benchmarks/cifar10_study.py, at full scale
    ladder  every rung from ResNet-50 to ConvNeXt-T: its speed at 224, and CIFAR-10 with half the
            width and all blocks: benchmarks/ladder.py
    all     one after the other

cifar, best, study and ladder go on where their result stops: call them again until they say that
nothing is left to do.

It uses the Python that runs it and installs nothing; test and triton need the package's dev extra.
CIFAR-10 comes from the imagefolder tree that CONVNEXT_NB_CIFAR10 names, or is downloaded. Further
arguments go to the stage's scripts; `--device cpu` with small values tries one out where there is
no GPU.
"""
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540  # seconds, for each stage
TRITON_CHAPTERS = "^0[67]_"  # of file names


def notebooks(**options):
    "The command that tests notebooks, one at a time, with the cells that are slow or need CUDA."
    options = dict(flags="slow cuda", n_workers=1, do_print=True) | options
    return [sys.executable, "-c", f"from nbdev.test import nbdev_test; nbdev_test(**{options!r})"]


def script(name, *options):
    return [sys.executable, f"benchmarks/{name}.py", *options]


def on_cifar10(name, minutes, *options):
    "The command of a script that reads CIFAR-10, for so many minutes."
    tree = os.environ.get("CONVNEXT_NB_CIFAR10")
    data = ["--data_dir", tree] if tree else []
    return script(name, *options, "--minutes", minutes, *data)


STAGES = {
    "test": [notebooks(skip_file_re=f"^[_.]|{TRITON_CHAPTERS}"),
             [sys.executable, "-m", "pytest", "-q", "-ra", "tests"]],
    "triton": [notebooks(file_re=TRITON_CHAPTERS)],
    "bench": [script("throughput", "--dtypes", "bfloat16", "--codes", "eager", "graph")],
    "compile": [script("throughput", "--dtypes", "bfloat16", "--formats", "channels_last",
                       "--codes", "compiled", "--networks", "ours, accelerated", "timm",
                       "timm, conv_mlp", "torchvision", "Hugging Face",
                       "--name", "throughput_cuda_compiled")],
    "kernels": [script("kernels", "--dtypes", "bfloat16", "float32")],
    "data": [script("data", "--batch_size", "512")],
    "cifar": [
        on_cifar10("cifar10", "5", "--presets", "cifar10-fast", "--seeds", "8", "--compiled",
                   "--stock"),
        on_cifar10("cifar10", "3.5", "--presets", "cifar10", "--seeds", "8", "--compiled")],
    "best": [on_cifar10("cifar10", "8.5", "--presets", "cifar10-best", "--seeds", "3")],
    "study": [on_cifar10("cifar10_study", "8", "--fraction", "1", "--epochs", "20")],
    "ladder": [
        script("ladder", "--speed", "--minutes", "1.5"),
        on_cifar10("ladder", "5.5", "--scale", ".5", "--depth", "1", "--fraction", "1",
                   "--epochs", "20", "--batch_size", "128")],
}
NEED_NBDEV = ("test", "triton")


def stop(message): sys.exit(f"gpu.py: error: {message}")


def missing(name):
    "What a stage needs and does not find, in words; None if it can run."
    if name not in NEED_NBDEV or find_spec("nbdev"): return None
    return f"stage {name} needs nbdev, which is not installed; pip install -e '.[dev]'"


def run_stage(name, extra):
    "Run the commands of a stage, all of them within LIMIT seconds."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    end = time.monotonic() + LIMIT
    for command in STAGES[name]:
        command = [*command, *extra]
        print("+", " ".join(command), flush=True)
        left = end - time.monotonic()
        try: subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
                            timeout=left, check=True)
        except subprocess.CalledProcessError as e:
            stop(f"stage {name} failed with status {e.returncode}")
        except subprocess.TimeoutExpired:
            stop(f"stage {name} took more than {LIMIT} s; what it had written stands")


def main(stage="all", *extra):
    if stage not in (*STAGES, "all"):
        stop(f"unknown stage {stage!r}; use {', '.join(STAGES)} or all")
    import torch
    if not torch.cuda.is_available() and "cpu" not in extra:
        stop(f"torch {torch.__version__} sees no GPU; --device cpu tries a stage out")
    if stage != "all":
        if missing(stage): stop(missing(stage))
        return run_stage(stage, () if stage in NEED_NBDEV else extra)
    for name in STAGES:  # each keeps its own values
        if missing(name): print(f"left out: {missing(name)}", flush=True)
        else: run_stage(name, ())


if __name__ == "__main__": main(*sys.argv[1:])
