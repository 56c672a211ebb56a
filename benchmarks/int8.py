r"""What int8 costs and brings: a CIFAR-10 network before and after, on all test images.

    python benchmarks/int8.py --data_dir TREE [--kinds batchnorm layernorm]

Trains the preset cifar10-fast, once as it is (BatchNorm) and once as the paper has its networks
(LayerNorm and LayerScale, which begins at 1), and exports each with `export_model`. The int8 files
are calibrated on 256 training images and differ in what stays in float32, in the scales, and in
the bits. `dynamic` is ONNX Runtime's quantization without calibration, with one scale a layer.
A file's speed is that of ONNX Runtime on batches of 500, in turns with all others of its network.
`val_top1` is the accuracy on images held out of the training set. What `convnext_nb.deploy` does
by default was chosen for speed and for safety without VNNI; a first trial of 7 and 8 bits looked at
test images, and saw no difference. Writes int8_cpu.json.
"""
import statistics
import tempfile
from functools import partial
from pathlib import Path

import common
import onnx
import torch
from common import interleaved, make_parser, seconds_of, write_result
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic
from PIL import Image

from convnext_nb import deploy
from convnext_nb.accelerate import accelerate, keep_freed_memory
from convnext_nb.data import create_loaders
from convnext_nb.runs import train
from convnext_nb.train import evaluate, preset

KINDS = {"batchnorm": {}, "layernorm": dict(norm_layer="layernorm", ls_init_value=1.)}
CPU = torch.device("cpu")


def nodes(path, kind):
    "Names of the nodes of the file that are of the kind."
    def is_depthwise(n): return any(a.name == "group" and a.i > 1 for a in n.attribute)
    tests = {"depthwise": lambda n: n.op_type == "Conv" and is_depthwise(n),
             "classifier": lambda n: n.op_type == "Gemm",
             "stem": lambda n: n.op_type == "Conv" and n is convs[0]}
    graph = onnx.load(path).graph.node
    convs = [n for n in graph if n.op_type == "Conv"]
    return [n.name for n in graph if tests[kind](n)]


# label -> options of quantize_static, over those of convnext_nb.deploy; a string: these nodes stay
VARIANTS = {
    "int8": {}, "8 bits of weight": dict(reduce_range=False),
    "one scale a layer": dict(per_channel=False),
    "depthwise in float32": "depthwise", "classifier in float32": "classifier",
    "stem in float32": "stem",
    "norms and GELU too": dict(
        op_types_to_quantize=["Conv", "Gemm", "LayerNormalization", "Gelu", "Add"]),
    "signed activations": dict(activation_type=QuantType.QInt8),
    "entropy": dict(calibrate_method=CalibrationMethod.Entropy),
    "percentile": dict(calibrate_method=CalibrationMethod.Percentile),
}


def quantize(change, path, arrays, original=deploy._quantize):
    "`deploy._quantize` with a change."
    if isinstance(change, str): change = dict(nodes_to_exclude=nodes(path, change))
    original(path, arrays, **change)


def files(net, images, folder, variants):
    "label -> file: float32, every variant of int8, and the dynamic one."
    paths = {"float32": folder / "float32.onnx"}
    deploy.export_model(net, paths["float32"])
    for i, (label, change) in enumerate(variants.items()):
        paths[label] = folder / f"{i}.onnx"
        deploy._quantize = partial(quantize, change)
        deploy._compare_int8 = lambda *_: {}  # a bad variant is measured too
        deploy.export_model(net, paths[label], calibrate=images)
    paths["dynamic"] = folder / "dynamic.onnx"
    with deploy._quiet(): quantize_dynamic(paths["float32"], paths["dynamic"])
    return paths


def speeds(runs, x, rounds):
    "Images a second of each, the median of the rounds."
    seconds = {label: [] for label in runs}
    for i, label in interleaved(list(runs), rounds + 1):
        taken = seconds_of(CPU, runs[label], x)
        if i: seconds[label].append(taken)
    return {label: len(x) / statistics.median(s) for label, s in seconds.items()}


def bfloat16(net):
    "Our fastest way to run it in PyTorch: folded, accelerated, bfloat16 weights."
    net = accelerate(deploy.fold(net)).bfloat16()
    def run(x):
        with torch.inference_mode():
            return net(x.bfloat16().to(memory_format=torch.channels_last))
    return run


def study(a, kind, folder):
    "Rows of one network."
    cfg = preset("cifar10-fast", dataset="imagefolder", data_dir=a.data_dir, device="cpu",
                 batch_size=a.batch_size, seed=a.seed, epochs=a.epochs, warmup_epochs=a.epochs / 10,
                 out=str(folder / "run"), **KINDS[kind])
    train(cfg)
    net = deploy.load_model(folder / "run" / "best.safetensors").eval()
    train_dl, *loaders = create_loaders(cfg)
    sample = train_dl.images[::len(train_dl.images) // 256][:256]
    paths = files(net, [Image.fromarray(x.numpy()) for x in sample], folder,
                  {k: VARIANTS[k] for k in a.variants})
    runs = {k: deploy.load_exported(p, torch.get_num_threads()) for k, p in paths.items()}
    def accuracy(m): return [evaluate(m, dl)["top1"] for dl in loaders]
    torch.manual_seed(0)
    rates = speeds(runs | {"bfloat16": bfloat16(net)}, torch.randn(500, 3, 32, 32), a.rounds)
    rows = [dict(network=kind, file=k, val_top1=v, test_top1=t, bytes=paths[k].stat().st_size,
                 images_per_s=rates[k]) for k, m in runs.items() for v, t in [accuracy(m)]]
    return rows + [dict(network=kind, file="PyTorch, bfloat16", images_per_s=rates["bfloat16"])]


def main():
    parser = make_parser(__doc__, "int8")
    add = parser.add_argument
    add("--data_dir", required=True, help="imagefolder tree of CIFAR-10")
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--epochs", type=int, default=5)
    add("--batch_size", type=int, default=256)
    add("--rounds", type=int, default=9)
    add("--seed", type=int, default=0)
    a = parser.parse_args()
    keep_freed_memory()
    where, rows = common.environment("cpu", a.data_dir), []
    for kind in a.kinds:
        with tempfile.TemporaryDirectory() as folder: rows += study(a, kind, Path(folder))
        base = next(r for r in rows if r["network"] == kind)
        for r in rows:
            if r["network"] != kind: continue
            top1 = f"val {r['val_top1']:.2%}, test {r['test_top1']:.2%}" if "val_top1" in r else ""
            print(f"{kind}, {r['file']}: {top1} {r['images_per_s'] / base['images_per_s']:.2f} "
                  "times the speed", flush=True)
        config = dict(preset="cifar10-fast", epochs=a.epochs, seed=a.seed, rounds=a.rounds)
        path = write_result(a.name or "int8_cpu", **where, config=config, settings=rows)
    print(path)


if __name__ == "__main__": main()
