"""What the boundary around a program tells of an error: a message, or a traceback of ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer

from llm2clip_vlm.cli import guard
from tests.conftest import REPO_ROOT


def disk_full(code: int) -> OSError:
    return OSError(code, os.strerror(code), "runs/x/model.safetensors")


MENDABLE = [
    *(disk_full(getattr(errno, name)) for name in (
        "ENOSPC EACCES EPERM EROFS EMFILE ENFILE ETXTBSY ENAMETOOLONG ENOTDIR EISDIR EIO ESTALE "
        "ENOMEM ELOOP EDQUOT EEXIST ENOTEMPTY").split()),
    FileNotFoundError(2, "No such file or directory", "data.json"),
    RuntimeError("Numpy is not available"),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    MemoryError(),
    ImportError("flash_attn is not installed"),
    SafetensorError("header too large"),
    yaml.YAMLError("mapping values are not allowed here"),
    EOFError("Ran out of input"),
    Image.DecompressionBombError("too large"),
    subprocess.CalledProcessError(1, ["git"]),
    Exception("expected value at line 1 column 1"),
    RecursionError("maximum recursion depth exceeded"),
    OverflowError("int too large"),
]  # fmt: skip


@pytest.mark.parametrize("error", MENDABLE, ids=repr)
def test_what_a_user_can_mend_is_one_message(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def program() -> int:
        raise error

    assert guard(program) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert getattr(error, "filename", None) is None or str(error.filename) in err
    kept = list(tmp_path.iterdir())
    assert len(kept) == (not isinstance(error, FileNotFoundError))
    assert not kept or (str(kept[0]) in err and "in program" in kept[0].read_text())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        assert "the disk is full: free space" in err
    if "out of memory" in str(error) or "Killed" in str(error):
        assert "not enough memory: use" in err
    monkeypatch.setenv("LLM2CLIP_DEBUG", "1")
    with pytest.raises(type(error)):
        guard(program)


@pytest.mark.parametrize("kind", [AssertionError, TypeError, AttributeError, KeyError, IndexError])
def test_our_mistakes_keep_their_traceback(
    kind: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)

    def program() -> int:
        raise kind("ours")

    assert guard(program) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in program" in err
    assert "please report it" in err


def test_a_library_that_raises_bare_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert guard(lambda: bool(Tokenizer.from_str("["))) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_and_a_closed_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> int:
        raise KeyboardInterrupt

    assert guard(program) == 130
    assert "Traceback" not in capsys.readouterr().err
    command = f"{sys.executable} -m llm2clip_vlm.cli help stage2b_vision_encoder"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
        cwd=REPO_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in {"0", "141"}


@pytest.mark.parametrize(
    "words",
    [
        "train stage3_projector {}",
        "train stage2b_vision_encoder {}",
        "train pipeline {}",
        "eval {}",
        "eval --suite {} --checkpoint a=b --output o",
        "compare {} {}",
        "convert {} out",
        "export {} --to llava out",
        "embed verify {}",
        "help {}",
    ],
)
@pytest.mark.parametrize("kind", ["absent", "folder", "nul", "list", "cut", "fifo"])
def test_every_command_tells_of_a_damaged_file(
    words: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from llm2clip_vlm.cli import main

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "given.yaml"
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind != "absent":
        file.write_bytes({"nul": b"\0" * 99, "list": b"[1, 2]", "cut": b"a: {b: [1"}[kind])
    try:
        code = main([word.format(file) for word in words.split()])
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    err = capsys.readouterr().err
    assert code != 0, err
    assert "Traceback" not in err
    assert "given.yaml" in err or "argument" in err
