"""Where the programs of `stages/`, `eval/`, `demo/` lie, in a checkout and in a wheel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent


def find_program(name: str, root: Path | None = None) -> Path:
    """File of a program.

    Args:
        name: Without its ending, such as `stage1_text_encoder` or `run_lmms`.
        root: A folder with `stages/`, `eval/` and `demo/` that is asked first.

    Raises:
        FileNotFoundError: There is none of this name; the message lists those there are.
    """
    roots = [_PACKAGE.parent] if root is None else [root, _PACKAGE.parent]
    folders = [place / kind for place in roots for kind in ("stages", "eval", "demo")]
    folders += [_PACKAGE / "stages", _PACKAGE / "eval_assets", _PACKAGE / "demo"]
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    known = sorted({path.stem for folder in folders for path in folder.glob("[a-z]*.py")})
    raise FileNotFoundError(f"no program `{name}`; there are: {', '.join(known)}")


def load_program(path: Path) -> ModuleType:
    """Import a program from its file (these folders are no packages in a checkout)."""
    name = f"llm2clip_vlm_program_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
