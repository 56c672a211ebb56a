"What every result says about where it comes from."
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

import convnext_nb

RESULTS = Path(__file__).parent / "results"


def _cpu():
    "Name of the processor, where the system tells."
    try: return next(l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name"))
    except (OSError, StopIteration): return platform.processor()


def environment(device) -> dict:
    "Machine, versions, commit and command of this process."
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    cuda = torch.device(device).type == "cuda"
    return dict(command=" ".join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
                commit=git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
                device=torch.cuda.get_device_name(device) if cuda else _cpu(), cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(),
                python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, convnext_nb=convnext_nb.__version__)


def write(name: str, **result) -> Path:
    "benchmarks/results/<name>.json"
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
