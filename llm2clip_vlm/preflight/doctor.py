"""What this machine has of what the stages need, one line each."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from llm2clip_vlm.runs.cores import allowed_threads, usable_cores
from llm2clip_vlm.runs.inputs import ask_hub

State = Literal["ok", "note", "broken"]

_REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "pydantic")
_OPTIONAL = {
    "peft": "LoRA (extra `train`)",
    "deepspeed": "ZeRO-2 and ZeRO-3 (extra `train`)",
    "datasets": "lmms-eval (extra `eval`)",
    "lmms_eval": "benchmarks (extra `eval`)",
    "scipy": "lmms-eval's statistics (extra `eval`)",
    "s3fs": "shards at s3:// (extra `remote`)",
    "gcsfs": "shards at gs:// (extra `remote`)",
    "openpyxl": "MMBench's submission file",
    "bitsandbytes": "load_in_4bit (QLoRA) and 8-bit optimizers",
    "flash_attn": "attn_implementation: flash_attention_2; sdpa, the default, needs nothing",
}


_ROOM_BYTES = 50e9
"""Less free space than a 7B model and its checkpoints take is worth a note."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    """`note`: something optional is absent; `broken`: a run would fail."""
    detail: str

    def __str__(self) -> str:
        return f"{self.state:>6}  {self.name}: {self.detail}"


def examine() -> Iterator[Finding]:
    """Yield the findings, cheap ones first. Imports torch, and torchvision if there is one."""
    yield Finding("python", "ok", platform.python_version())
    for name, purpose in {**dict.fromkeys(_REQUIRED, ""), **_OPTIONAL}.items():
        version = _version(name)
        absent = f"absent; needed for {purpose}; " if purpose else "absent; "
        absent += f"pip install {name.replace('_', '-')}"
        state: State = "ok" if version else "note" if purpose else "broken"
        yield Finding(name, state, version or absent)
    missing = " and ".join(tool for tool in ("g++", "ninja") if shutil.which(tool) is None)
    detail = f"{missing} not on PATH; needed only by DeepSpeed's own optimizers and offload"
    yield Finding("compiler", "note", detail) if missing else Finding("compiler", "ok", "on PATH")
    models = (torch_state, torchvision_state, entry_point_state)
    for state_of in (*models, hub_folder_state, hub_access_state, disk_state, threads_state):
        yield state_of()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_failure(name: str, load: Callable[[str], object]) -> str | None:
    """Why a module does not import. None: it does.

    Compiled modules raise more than ImportError: torchvision's mismatch with torch is a
    RuntimeError, a bad shared library an OSError.
    """
    try:
        load(name)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def torch_state(load: Callable[[str], object] = importlib.import_module) -> Finding:
    """Whether torch imports, and the devices that it sees."""
    if (failure := _import_failure("torch", load)) is not None:
        return Finding("devices", "broken", f"torch does not import: {failure}")
    import torch

    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        lacking = f"a driver for CUDA {cuda}" if cuda else "torch for CUDA"
        detail = f"no CUDA GPU; {usable_cores()} CPU cores, gloo; if there is one, install "
        detail += lacking
        return Finding("devices", "note", detail)
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = [f"{gpu.name} with {gpu.total_memory / 1e9:.0f} GB" for gpu in found]
    told = f"{', '.join(names)}; CUDA {torch.version.cuda}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("devices", "ok", f"{told}; bf16")
    return Finding("devices", "note", f"{told}; no bf16: trainer.bf16=false trainer.fp16=true")


def torchvision_state(
    load: Callable[[str], object] = importlib.import_module,
    find: Callable[[str], object | None] = importlib.util.find_spec,
) -> Finding:
    """Absent is fine (transformers then resizes with PIL), broken is fatal.

    A broken one also breaks `from transformers import AutoProcessor`.
    """
    if find("torchvision") is None:
        return Finding("torchvision", "ok", "none (images are resized with PIL)")
    if (failure := _import_failure("torchvision", load)) is not None:
        advice = "pip uninstall torchvision, or install the build that matches torch"
        return Finding("torchvision", "broken", f"{failure}; {advice}")
    return Finding("torchvision", "ok", _version("torchvision") or "present")


def entry_point_state() -> Finding:
    """Whether lmms-eval will find the adapter."""
    name = "lmms-eval entry point"
    if not (found := metadata.entry_points(group="lmms_eval.models", name="llm2clip_vlm")):
        return Finding(name, "note", "absent; pip install -e . (or the wheel)")
    entry = next(iter(found))
    failure = _import_failure(entry.value, lambda _: entry.load())
    if failure is not None:
        return Finding(name, "broken", f"{entry.value} does not load: {failure}")
    return Finding(name, "ok", entry.value)


def hub_folder_state() -> Finding:
    """Whether the Hugging Face cache can be written."""
    folder = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Finding("HF_HOME", "ok", f"{folder} is writable")
    except OSError as error:
        advice = "set HF_HOME to a folder that is"
        return Finding("HF_HOME", "broken", f"{folder} is not writable ({error}); {advice}")


def hub_access_state() -> Finding:
    """Whether the hub answers, and to whom; a token itself is never shown."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        detail = "not asked (HF_HUB_OFFLINE is set); only what `hf download` fetched is there"
        return Finding("hub", "note", detail)
    status = ask_hub("api/whoami-v2" if get_token() else "api/models?limit=1")
    if status is None:
        advice = "`hf download` what a recipe names elsewhere, copy HF_HOME, set HF_HUB_OFFLINE=1"
        return Finding("hub", "note", f"{constants.ENDPOINT} does not answer; {advice}")
    if not get_token():
        return Finding("hub", "note", "answers; no token, for gated models (Llama): hf auth login")
    if status != 200:
        return Finding("hub", "broken", f"refuses the token ({status}): hf auth login")
    return Finding("hub", "ok", "answers, and knows the token")


def disk_state() -> Finding:
    """Free space where runs and the hub's models go."""
    from huggingface_hub import constants

    places = {"here": Path.cwd(), "hub cache": Path(constants.HF_HUB_CACHE)}
    free = {
        name: shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
        for name, place in places.items()
    }
    told = ", ".join(f"{size / 1e9:.0f} GB free {name}" for name, size in free.items())
    if min(free.values()) >= _ROOM_BYTES:
        return Finding("disk", "ok", told)
    advice = "`plan RECIPE` says what a run takes; other places: output_dir=..., HF_HOME"
    return Finding("disk", "note", f"{told}; {advice}")


def threads_state() -> Finding:
    """Whether OpenMP would start more threads than there are idle cores."""
    cores = usable_cores()
    idle = max(1, round(cores - os.getloadavg()[0]))
    threads = allowed_threads(cores)
    told = f"{threads} OpenMP threads, {cores} cores, about {idle} idle"
    if threads <= idle:
        return Finding("threads", "ok", told)
    advice = f"on a busy machine they wait for each other: export OMP_NUM_THREADS={idle}"
    return Finding("threads", "note", f"{told}; {advice}")
