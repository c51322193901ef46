"""A rented GPU's hour: python -m lorasae.bench gpu --json gpu.json

    environment     what the figures depend on: hardware, driver, versions
    peak            FLOP/s of a square matrix product in each precision, for the utilisation
    headline        the step of `train.py --model gemma-2-2b`: tokens/s, utilisation, memory,
                    launches, synchronisations, kernels; compiled against plain; L0 with and
                    without TF32
    peers           the same step beside transformers + peft
    sae kl topk     the sections of that name

Every part runs in a process of its own, of at most ten minutes, so that each survives the failure
of another, and its rows are kept as soon as it is done. --part PART ... runs some of them in this
process.
"""
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from lorasae.bench.loss import bench_kl
from lorasae.bench.race import race, synchronise
from lorasae.bench.sparse import bench_topk
from lorasae.bench.step import differing_steps, load_peers, lora_contenders, matmul_peak, with_rates
from lorasae.bench.training import bench_sae
from lorasae.bench.workloads import (
    REAL, TINY, Ours, precision_of_train, random_adapter, random_setting)
from lorasae.io.files import read_json

LIMIT = 600                                             # seconds a part may take


def bench_gpu(device, quick, chosen, keep):
    """Runs the parts, hands each one's rows to keep("gpu PART", rows), and returns the names of
    those that failed.
    """
    failed = []
    for name in chosen or PARTS:
        print(f"---- {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            rows = PARTS[name](device, quick) if chosen else in_a_process(name, device, quick)
        except Exception as error:  # whatever it was: the other parts have been paid for too
            traceback.print_exc()
            rows = [{"what": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}]
            failed.append(name)
        seconds = time.perf_counter() - start
        keep(f"gpu {name}", rows + [{"what": f"{name}, all of it", "seconds": seconds}])
    return failed


def in_a_process(name, device, quick):
    """The rows of a part that runs alone: not even a crash of CUDA reaches the others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, "-m", "lorasae.bench", "gpu", "--part", name]
        command += ["--device", device, "--json", str(path)]
        done = subprocess.run(command + ["--quick"] * quick, timeout=LIMIT,
                              stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise RuntimeError(f"its process ended with status {done.returncode}, as said above")
        return read_json(path)["sections"][f"gpu {name}"][:-1]  # the last row is its own time


# ---- environment ---------------------------------------------------------------------------------

def environment(device, quick):
    """One row a fact."""
    facts = {**about(device), "python": platform.python_version(), "processors": os.cpu_count()}
    for package in ("triton", "numpy", "safetensors"):
        facts[package] = version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"memory_gb": properties.total_memory / 1e9,
                  "multiprocessors": properties.multi_processor_count,
                  "capability": f"{properties.major}.{properties.minor}",
                  "cuda": torch.version.cuda,
                  "driver": nvidia_smi("driver_version"), "clock": nvidia_smi("clocks.max.sm"),
                  "power": nvidia_smi("power.limit")}
    return [{"what": name, "value": value} for name, value in facts.items()]


def about(device):
    """What a figure depends on beside the code."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{processor()}, {torch.get_num_threads()} threads"
    return {"device": device, "hardware": hardware, "torch": torch.__version__,
            "transformers": version("transformers"), "peft": version("peft")}


def processor():
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def version(package):
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def nvidia_smi(field):
    """A field of nvidia-smi, or None where there is no such program."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.splitlines()
    return lines[0].strip() if found.returncode == 0 and lines else None


# ---- peak ----------------------------------------------------------------------------------------

def peak(device, quick):
    """FLOP/s of a square product; "high" is TF32 on a GPU, and not asked for on a CPU."""
    size, rows = 256 if quick else 8192, []
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "highest"),
                             (torch.float32, "high")):
        if device == "cpu" and precision == "high":
            continue
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        flops = matmul_peak(device, dtype, size)
        torch.set_float32_matmul_precision(before)
        name = str(dtype).removeprefix("torch.") + (" by TF32" if precision == "high" else "")
        rows.append({"what": f"product of {size} x {size}", "contender": name,
                     "tflops": flops / 1e12})
    return rows


# ---- headline ------------------------------------------------------------------------------------

def headline(device, quick):
    """The step of the headline run, as train.py makes it and varied."""
    case = TINY["tiny gemma"] if quick else REAL["gemma-2-2b"]
    best = matmul_peak(device, case.dtype, 256 if quick else 8192)
    model, sae, tokens = random_setting(case, device)
    adapters = random_adapter(model, case.blocks, case.rank)
    ours = partial(Ours, case, model, sae, tokens, [adapters])

    rows = []
    for name, dropout, tf32 in (("as train.py runs it", 0.1, True), ("no dropout", 0.0, True),
                                ("no TF32", 0.1, False)):
        rows.append(measured_step(name, ours(dropout=dropout, tf32=tf32), case, best, device, 2
                                  if quick else 6))
    rows += compiled_and_plain(ours(), device)
    rows += [{"what": "L0 of the SAE", "contender": name, "value": value}
             for name, value in l0_by_precision(model, sae, tokens, case.layer).items()]
    return rows + kernels(ours(dropout=0.1), device)


def measured_step(name, ours, case, best, device, rounds):
    """A row: the step's time, rate, utilisation of `best` FLOP/s, memory, launches and
    synchronisations.
    """
    start = time.perf_counter()
    ours()
    ours()
    synchronise(device)
    warm = time.perf_counter() - start

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = case.ahead // case.batch
    issued, seconds = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        # until the processor has said all it has to say
        issued.append((time.perf_counter() - start) / steps)
        synchronise(device)
        seconds.append((time.perf_counter() - start) / steps)

    row = {"what": "headline step", "contender": f"lorasae, {name}",
           "ms": 1e3 * statistics.median(seconds),
           "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds),
           "issue_ms": 1e3 * statistics.median(issued)}
    # its times are of all the steps of a call
    rated = with_rates({**row, "ms": row["ms"] * steps}, case, best)
    row |= {key: rated[key] for key in ("tokens_per_s", "s_15M", "utilisation")}
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    row["launches"] = launches(ours) / steps
    row["syncs"] = synchronisations(ours, device)
    row["warm_s"] = warm
    return row


def launches(function):
    """Kernels that one call starts on a GPU."""
    with torch.profiler.profile() as found:
        function()
    return sum(event.count for event in found.key_averages() if "LaunchKernel" in event.key)


def synchronisations(function, device):
    """Waits for the GPU within one call; each is said once, with its place. 0 without a GPU."""
    if device != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in waits}):
        print("waits for the GPU:", place, file=sys.stderr)
    return len(waits)


def compiled_and_plain(ours, device):
    """The loss and the norm of the gradient, with torch.compile (on a GPU) and without."""
    rows, gradients = [], []
    for compiled in (device == "cuda", False):
        ours.compiled = compiled
        answer = ours.answer()
        loss = answer.pop("loss").sum()
        gradients.append(torch.cat([gradient.flatten() for gradient in answer.values()]))
        rows.append({"what": "loss", "contender": "compiled" if compiled else "plain",
                     "value": loss.item()})
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    rows.append({"what": "relative distance of gradients", "contender": "compiled, plain",
                 "value": error.item()})
    return rows


@torch.no_grad()
def l0_by_precision(model, sae, tokens, layer):
    """{precision: L0} of the SAE on the model's activations: thresholds are sharp, so rounding
    could move it.
    """
    x = model.run(model.embed(tokens), 0, layer + 1).flatten(0, 1)
    found = {}
    for name in ("fp32", "TF32"):
        with precision_of_train(tokens.device.type, tf32=name == "TF32"):
            active = sum((sae.encode(part) > 0).sum().item() for part in x.split(1024))
        found[name] = active / len(x)
    return found


def kernels(ours, device, most=20):
    """Where the time of a call goes: the kernels (on a CPU: operations) that take most of it."""
    ours()
    with torch.profiler.profile() as found:
        ours()
        synchronise(device)
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [event for event in found.key_averages() if device == "cpu"
              or not event.self_cpu_time_total]
    whole = sum(getattr(event, key) for event in events)
    events.sort(key=lambda event: getattr(event, key), reverse=True)

    rows = []
    for event in events[:most]:
        spent = getattr(event, key)
        rows.append({"what": "part of the time", "contender": event.key[:90], "ms": spent / 1e3,
                     "count": event.count,
                     "part": spent / whole})
    return rows


# ---- peers ---------------------------------------------------------------------------------------

def peers(device, quick):
    """The LoRA step of the headline model beside transformers + peft; ours alone where those are
    not installed.
    """
    case = TINY["tiny gemma"] if quick else REAL["gemma-2-2b"]
    rows = race("LoRA step, headline", partial(lora_contenders, case, load_peers()),
                partial(differing_steps, case),
                2 if quick else 5, device, memory=not quick,
                answer=lambda contender: contender.answer(), warm=1)
    best = matmul_peak(device, case.dtype, 256 if quick else 8192)
    return [with_rates(row, case, best) for row in rows]


PARTS = {"environment": environment, "peak": peak, "headline": headline, "peers": peers,
         "sae": bench_sae, "kl": bench_kl, "topk": bench_topk}
