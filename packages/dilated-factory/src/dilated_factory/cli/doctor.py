"""`dilated doctor`: what is installed, what works, and why the rest does not."""

import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention
from dilated_factory.cli.options import Json
from dilated_factory.cli.output import plain_console
from dilated_factory.configs.attention import DilatedBackend, SparseBackend
from dilated_factory.installing import how_to_install
from dilated_factory.kinds.default import default_registry
from dilated_factory.room import machine_memory

EXIT_BROKEN = 1
_PACKAGES = (
    *("dilated-core", "dilated-pool", "dilated-sparse", "dilated-ring", "dilated-factory"),
    *("torch", "triton", "numpy", "pydantic", "safetensors", "matplotlib", "typer", "rich"),
    *("transformers", "tokenizers", "h5py", "scikit-learn"),
)
_YES, _NOT_HERE, _FAULT = Text("yes"), Text("not here", "dim"), Text("FAULT", "bold red")
# How a backend says that it cannot serve such a call.
_REFUSAL = re.compile(r"backend must be able to serve the call\. Got '\w+', but (?P<why>.+)\.")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_PATTERN = DilatedPattern([16, 64], [1, 4])
_SHAPE = (1, 64, 4, 16)


class Check(NamedTuple):
    """Whether something works; `broken` where it ought to and does not."""

    what: str
    works: bool
    why: str
    broken: bool = False


def doctor(
    as_json: Json = False,
) -> int:
    """Say what is installed, which backends work, and why the others do not.

    Each backend computes a small attention, forward and backward, and is compared with the
    reference. What this machine merely lacks is "not here"; what ought to work and does not is a
    "FAULT", for which the exit code is 1.

    Examples:
        dilated doctor
        dilated doctor --json
    """
    facts = machine()
    versions = installed_versions()
    checks = [*attention_checks(), *group_checks()]
    registry = default_registry()
    kinds = dict.fromkeys(registry, "") | {
        kind: how_to_install(*packages) for kind, packages in registry.missing().items()
    }
    if as_json:
        record = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": devices(),
            "machine": facts,
            "versions": versions,
            "checks": [check._asdict() for check in checks],
            "kinds": {kind: {"works": not need, "needs": need} for kind, need in kinds.items()},
        }
        print(json.dumps(record))
    else:
        _print_tables(facts, versions, checks, kinds)
    return EXIT_BROKEN if any(check.broken for check in checks) else 0


def installed_versions() -> dict[str, str | None]:
    """The version of each package that matters here, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # Found without metadata where sources are on the path.
            there = importlib.util.find_spec(package.replace("-", "_")) is not None
            found[package] = "from sources" if there else None
    return found


def devices() -> list[str]:
    """The devices to compute on."""
    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    threads = f"cpu ({torch.get_num_threads()} threads)"
    return [threads, *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in cuda)]


def machine() -> dict[str, str]:
    """What this machine computes with, and compiles with."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    facts = {
        "CPU cores": f"{cores}, of them usable {usable}, threads of torch {torch.get_num_threads()}"
    }
    if (memory := machine_memory()) is not None:
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    compiler = _c_compiler()
    facts["C compiler"] = compiler or "none found; Triton and torch.compile need one"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = (
            f"{device.name}, capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.1f} GiB"
        )
    if (driver := _nvidia_driver()) is not None:
        facts["NVIDIA driver"] = driver
    return facts


def _c_compiler() -> str | None:
    """The one that CC names, else the first of the usual ones."""
    named = os.environ.get("CC", "").split()[:1]
    return next(filter(None, map(shutil.which, named or ("cc", "gcc", "clang", "cl"))), None)


def _nvidia_driver() -> str | None:
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else None


def attention_checks() -> list[Check]:
    """Every backend of dilated and of block-sparse attention, on every kind of device."""
    kinds = [("dilated attention", _dilated, get_args(DilatedBackend))]
    if importlib.util.find_spec("dilated_sparse") is not None:
        kinds.append(("block-sparse attention", _block_sparse, get_args(SparseBackend)))
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    checks = []
    for device, (name, attention, backends) in itertools.product(devices, kinds):
        for backend in backends:
            if (device, backend) != ("cpu", "triton"):
                what = f"{name}, {backend}, {device}"
                checks.append(_check(what, attention, backend, device))
            elif "cuda" not in devices:
                why = "not on this machine: no CUDA device"
                checks.append(Check(f"{name}, {backend}", False, why))
    if importlib.util.find_spec("dilated_sparse") is None:
        missing = f"not installed: {how_to_install('dilated-sparse')}"
        checks.append(Check("block-sparse attention", False, missing))
    return checks


def group_checks() -> list[Check]:
    """The ways in which processes can exchange tensors."""
    if not dist.is_available():
        return [Check("torch.distributed", False, "this torch is built without it")]
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    gpus = torch.cuda.is_available()
    no_device = "" if gpus else "not on this machine: no CUDA device"
    without = no_device if nccl else "this torch has no nccl"
    return [
        Check("process groups on CPU, gloo", gloo, "" if gloo else "this torch has no gloo"),
        Check("process groups on GPUs, nccl", nccl and gpus, without),
    ]


Attention = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def _dilated(query: Tensor, key: Tensor, value: Tensor, backend: DilatedBackend) -> Tensor:
    out = dilated_attention(query, key, value, _PATTERN, is_causal=True, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _block_sparse(query: Tensor, key: Tensor, value: Tensor, backend: SparseBackend) -> Tensor:
    from dilated_sparse import block_sparse_attention, layouts

    layout = layouts.sliding_window(_SHAPE[1], 9, block_size=16)
    out = block_sparse_attention(query, key, value, layout, is_causal=True, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _check(what: str, attention: Attention, backend: str, device: str) -> Check:
    try:
        got = _outputs(attention, backend, device)
    except Exception as error:
        refused = isinstance(error, ValueError) and _REFUSAL.fullmatch(str(error))
        if refused:
            return Check(what, False, refused["why"])
        return Check(what, False, f"{type(error).__name__}: {error}", broken=True)
    expected = _outputs(attention, "reference", "cpu")
    difference = max(
        ((g.cpu() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)
    )
    # TF32, which GPUs may use for float32, is good to about 1e-3.
    works = difference < 1e-2
    verb = "agrees with the reference to" if works else "differs from the reference by"
    return Check(what, works, f"{verb} {difference:.0e}", broken=not works)


def _outputs(attention: Attention, backend: str, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(_SHAPE, generator=generator).to(device) for _ in range(4)]
    query, key, value = (x.requires_grad_() for x in tensors[:3])
    out = attention(query, key, value, backend)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), tensors[3])]


def _print_tables(
    facts: dict[str, str],
    versions: dict[str, str | None],
    checks: list[Check],
    kinds: dict[str, str],
) -> None:
    console = plain_console()
    console.print(f"Python {platform.python_version()}, {platform.platform()}", soft_wrap=True)
    rows: list[tuple[str, list[tuple[str | Text, ...]]]] = [
        ("Machine", list(facts.items())),
        ("Packages", [(p, v or _NOT_HERE) for p, v in versions.items()]),
        ("Backends", [(c.what, _verdict(c), c.why) for c in checks]),
        ("Kinds of attention", [(k, _NOT_HERE if n else _YES, n) for k, n in kinds.items()]),
    ]
    for title, lines in rows:
        table = Table(title=title, title_justify="left", show_header=False)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def _verdict(check: Check) -> Text:
    return _FAULT if check.broken else _YES if check.works else _NOT_HERE
