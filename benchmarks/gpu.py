"""Everything that needs a GPU, in stages of at most 9 minutes: python benchmarks/gpu.py STAGE   (or: make gpu STAGE=...)

    test    the notebooks with their `cuda` cells but chapter 06, then pytest
    triton  chapter 06 with its `cuda` cells: every kernel compiled, tuned, and beside PyTorch
    bench   convnext_tiny, accelerated too, beside timm, torchvision, Hugging Face, Meta's layout and the hardware: benchmarks/throughput.py
    compile the same under torch.compile, channels_last alone; what it compiled stays in torch's cache, so if its time runs out, call it again
    kernels the Triton kernels beside PyTorch, stage by stage: benchmarks/kernels.py
    data    batches from memory beside torchvision's, and how long a training step waits: benchmarks/data.py
    cifar   CIFAR-10 from scratch at full scale: benchmarks/cifar10.py, the presets cifar10-fast and cifar10 with eight seeds each
    best    the preset cifar10-best, three seeds, one or more at a time
    study   one change at a time: benchmarks/cifar10_study.py, at full scale
    ladder  every rung from ResNet-50 to ConvNeXt-T: its speed at 224, and CIFAR-10 with half the width and all blocks: benchmarks/ladder.py
    all     one after the other

cifar, best, study and ladder go on where their result stops: call them again until they have nothing left to do.

It uses the Python that runs it and installs nothing. CIFAR-10 comes from the imagefolder tree that CONVNEXT_NB_CIFAR10 names, or is downloaded.
Further arguments go to the stage's scripts; `--device cpu` with small values tries one out where there is no GPU.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540  # seconds, for each stage

tree = os.environ.get("CONVNEXT_NB_CIFAR10")
data = ["--data_dir", tree] if tree else []
STAGES = {
    "test": [[sys.executable, "-c", "from nbdev.test import nbdev_test; nbdev_test(flags='cuda', n_workers=1, skip_file_re=r'^[_.]|^06')"],
             [sys.executable, "-m", "pytest", "-q", "-ra", "tests"]],
    "triton": [[sys.executable, "-c", "from nbdev.test import nbdev_test; nbdev_test('nbs/06_kernels.ipynb', flags='cuda', n_workers=1, do_print=True)"]],
    "bench": [[sys.executable, "benchmarks/throughput.py", "--dtypes", "bfloat16"]],
    "compile": [[sys.executable, "benchmarks/throughput.py", "--dtypes", "bfloat16", "--formats", "channels_last", "--codes", "compiled",
                 "--name", "throughput_cuda_compiled"]],
    "kernels": [[sys.executable, "benchmarks/kernels.py", "--dtypes", "bfloat16", "float32"]],
    "data": [[sys.executable, "benchmarks/data.py", "--batch_size", "512"]],
    "cifar": [[sys.executable, "benchmarks/cifar10.py", "--presets", "cifar10-fast", "--seeds", "8", "--compiled", "--stock", "--minutes", "5", *data],
              [sys.executable, "benchmarks/cifar10.py", "--presets", "cifar10", "--seeds", "8", "--compiled", "--minutes", "3.5", *data]],
    "best": [[sys.executable, "benchmarks/cifar10.py", "--presets", "cifar10-best", "--seeds", "3", "--minutes", "8.5", *data]],
    "study": [[sys.executable, "benchmarks/cifar10_study.py", "--fraction", "1", "--epochs", "20", "--minutes", "8", *data]],
    "ladder": [[sys.executable, "benchmarks/ladder.py", "--speed", "--minutes", "1.5"],
               [sys.executable, "benchmarks/ladder.py", "--scale", ".5", "--depth", "1", "--fraction", "1", "--epochs", "20", "--batch_size", "128", "--minutes", "5.5", *data]],
}


def main(stage="all", *extra):
    if stage not in (*STAGES, "all"): sys.exit(f"gpu.py: error: unknown stage {stage!r}; use {', '.join(STAGES)} or all")
    import torch
    if not torch.cuda.is_available() and "cpu" not in extra: sys.exit(f"gpu.py: error: torch {torch.__version__} sees no GPU; --device cpu tries a stage out")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name in STAGES if stage == "all" else [stage]:
        end = time.monotonic() + LIMIT
        for command in STAGES[name]:
            if name == stage not in ("test", "triton"): command = [*command, *extra]  # with `all`, each stage keeps its own values
            print("+", " ".join(command), flush=True)
            try: subprocess.run(command, cwd=ROOT, env=env, timeout=end - time.monotonic(), check=True)
            except subprocess.CalledProcessError as e: sys.exit(f"gpu.py: error: stage {name} failed with status {e.returncode}")
            except subprocess.TimeoutExpired: sys.exit(f"gpu.py: error: stage {name} took more than {LIMIT} s; what it had written stands")


if __name__ == "__main__": main(*sys.argv[1:])
