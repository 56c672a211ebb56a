"""One network of benchmarks/deploy.py, in a process of its own that imports its runtime alone.

    python benchmarks/deploy_worker.py JSON     kind, path, model, dtype, threads, size

It answers on standard output when it has run once, and then each line [batch, calls] of standard
input with a line of seconds. A call goes from an array (N, 3, S, S) to an array of logits.
"""
import json
import sys
import time

import numpy as np

BFLOAT16 = "bfloat16"


def torch_call(net, dtype, threads, channels_last):
    "A function of arrays around a module."
    import torch

    from convnext_nb.accelerate import keep_freed_memory
    keep_freed_memory()  # for the peers too
    torch.set_num_threads(threads)
    how = dict(dtype=torch.bfloat16 if dtype == BFLOAT16 else torch.float32)
    if channels_last: how["memory_format"] = torch.channels_last
    def call(x):
        with torch.inference_mode(): return net(torch.from_numpy(x).to(**how)).float().numpy()
    return call


def in_torch(net, spec, compiled=False, channels_last=False, fast=False):
    "A network of ours or timm's."
    import torch
    net = net.eval().to(torch.bfloat16 if spec["dtype"] == BFLOAT16 else torch.float32)
    if channels_last: net = net.to(memory_format=torch.channels_last)
    if fast:
        from convnext_nb.accelerate import accelerate
        from convnext_nb.deploy import fold
        net = accelerate(fold(net))
    if compiled: net = torch.compile(net, dynamic=False)
    return torch_call(net, spec["dtype"], spec["threads"], channels_last)


def ours(spec, **how):
    from convnext_nb.model import create_model
    return in_torch(create_model(spec["model"]), spec, channels_last=True, **how)


def timm(spec, **how):
    import timm
    return in_torch(timm.create_model(spec["model"]), spec, **how)


def aot(spec):
    import torch
    return torch_call(torch._inductor.aoti_load_package(spec["path"]), "float32", spec["threads"],
                      channels_last=False)


def onnx_runtime(spec):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    session = onnxruntime.InferenceSession(spec["path"], options,
                                           providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def openvino(spec):
    import openvino
    precision = "bf16" if spec["dtype"] == BFLOAT16 else "f32"
    compiled = openvino.Core().compile_model(spec["path"], "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": spec["threads"],
        "PERFORMANCE_HINT": "LATENCY"})
    return lambda x: compiled(x)[0]


OPEN = {
    "ours": ours, "ours, accelerated": lambda s: ours(s, fast=True),
    "ours, compiled": lambda s: ours(s, fast=True, compiled=True),
    "timm": timm, "timm, channels_last": lambda s: timm(s, channels_last=True),
    "timm, compiled": lambda s: timm(s, compiled=True),
    "aot": aot, "onnxruntime": onnx_runtime, "openvino": openvino}


def peak_mb():
    "Of this process; ru_maxrss would begin with what the parent had."
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main():
    spec = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes elsewhere
    def say(what): print(json.dumps(what), file=answers, flush=True)
    call, size, inputs = OPEN[spec["kind"]](spec), spec["size"], {}
    rng = np.random.default_rng(0)
    def batch_of(n): return rng.standard_normal((n, 3, size, size), np.float32)
    call(batch_of(1))
    say(dict(peak_mb=peak_mb()))
    for line in sys.stdin:
        n, calls = json.loads(line)
        if n not in inputs: inputs[n] = batch_of(n)
        call(inputs[n])
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call(inputs[n])
            seconds.append(time.perf_counter() - start)
        say(seconds)


if __name__ == "__main__": main()
