"""Two machines on one: network namespaces joined by a cable, or two loopback addresses.

Each has a working folder of its own and starts its own `accelerate launch`, by the line that
`docs/multi-gpu.md` prints; `output_dir`, recipes and data lie in a folder that both see.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.distributed.elastic.utils.distributed import get_free_port

from tests.conftest import REPO_ROOT
from tests.vlm_fixtures import environment

DOCS = REPO_ROOT / "docs" / "multi-gpu.md"


class Machine(NamedTuple):
    """One of the two."""

    address: str
    before: list[str]
    """Words in front of a command that is to run there."""
    env: dict[str, str]
    folder: Path
    """Its own working folder; `log.txt` has what its launcher and processes print."""

    @property
    def log(self) -> str:
        """All that it has printed."""
        return (self.folder / "log.txt").read_text(errors="replace")


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[list[Machine]]:
    """Set two machines up; as root with `ip` each has its own network, else its own address."""
    boxes = [folder / f"box{n}" for n in (0, 1)]
    for box in boxes:
        box.mkdir(parents=True)
    tag = f"l2c{os.getpid() % 100_000}"
    names = [f"{tag}-{n}" for n in (0, 1)]
    if not _cable(names):
        _remove(names)
        yield [Machine(f"127.0.0.{n + 1}", [], {}, box) for n, box in enumerate(boxes)]
        return
    try:
        yield [
            Machine(
                f"10.213.0.{n + 1}",
                ["ip", "netns", "exec", name],
                {"GLOO_SOCKET_IFNAME": f"{name}"},
                box,
            )
            for n, (name, box) in enumerate(zip(names, boxes, strict=True))
        ]
    finally:
        _remove(names)


def _cable(names: Sequence[str]) -> bool:
    """Make two network namespaces whose only link has the name of its own one."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    a, b = names
    lines = [f"netns add {a}", f"netns add {b}"]
    lines += [f"link add {a} netns {a} type veth peer name {b} netns {b}"]
    for number, name in enumerate(names):
        lines += [
            f"-n {name} addr add 10.213.0.{number + 1}/24 dev {name}",
            f"-n {name} link set lo up",
            f"-n {name} link set {name} up",
        ]
    return all(
        subprocess.run(["ip", *line.split()], check=False, capture_output=True).returncode == 0
        for line in lines
    )


def _remove(names: Sequence[str]) -> None:
    for name in names:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def printed_line(stage: str, config: str) -> list[str]:
    """The words of the line in the docs that starts a stage on several machines."""
    text = DOCS.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("accelerate launch")]
    found = [
        line for line in lines if "--num_machines" in line and stage in line and config in line
    ]
    assert len(found) == 1, (stage, config, found)
    return shlex.split(found[0])[2:]


class Job:
    """One stage on both machines.

    Args:
        machines: From :func:`two_machines`.
        stage: Name of the stage's program.
        config: Name of the launcher's file, as in the printed line.
        recipe: Recipe.
        overrides: `key=value`.
        env: More environment of the second machine.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        stage: str,
        config: str,
        recipe: Path,
        *overrides: str,
        env: dict[str, str] | None = None,
    ) -> None:
        self.machines = machines
        printed = printed_line(stage, config)
        port = get_free_port()
        self.launchers = []
        for rank, machine in enumerate(machines):
            cpu = machine.folder / config
            text = (REPO_ROOT / "recipes" / "accelerate" / config).read_text()
            assert "use_cpu: false" in text
            cpu.write_text(text.replace("use_cpu: false", "use_cpu: true"))
            values = {
                "--config_file": str(cpu),
                "--num_machines": "2",
                "--num_processes": "2",
                "--machine_rank": str(rank),
                "--main_process_ip": machines[0].address,
            }
            script = next(n for n, word in enumerate(printed) if word.startswith("stages/"))
            words = printed[:script]
            for name, value in values.items():
                words[words.index(name) + 1] = value
            words += ["--main_process_port", str(port), str(REPO_ROOT / printed[script])]
            with (machine.folder / "log.txt").open("wb") as log:
                process = subprocess.Popen(
                    [
                        *machine.before,
                        *(sys.executable, "-m", "accelerate.commands.launch"),
                        *(*words, str(recipe), *overrides),
                    ],
                    env=environment() | machine.env | ((env or {}) if rank else {}),
                    cwd=machine.folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.launchers.append(process)

    def worker(self, rank: int) -> int:
        """Process id of the stage's program on a machine."""
        launcher = self.launchers[rank].pid
        for _ in range(1200):
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            for child in children:
                if b"stages/" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
            time.sleep(0.1)
        raise AssertionError(self.logs())

    def when(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so."""
        for _ in range(12000):
            if reached():
                return
            assert all(p.poll() is None for p in self.launchers), self.logs()
            time.sleep(0.02)
        raise AssertionError(self.logs())

    def ended(self, timeout_s: float = 300.0) -> list[int]:
        """Exit codes of both launchers, once they have ended."""
        deadline = time.monotonic() + timeout_s
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.launchers]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.logs()) from None
        finally:
            for process in self.launchers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def succeeds(self) -> None:
        """Wait for its end, without an error."""
        assert self.ended() == [0, 0], self.logs()

    def logs(self) -> str:
        """The end of what both have printed."""
        return "\n".join(f"--- {m.address}\n{m.log[-5000:]}" for m in self.machines)
