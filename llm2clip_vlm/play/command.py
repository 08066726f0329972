"""`llm2clip-vlm chat`, `search` and `app`: their options; heavy imports wait until these fit.

The docstring of what runs a command is its help.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.options import Parser, number

_MODEL = "a model directory, a stage's output, or a hub id"


def parser(command: str) -> argparse.ArgumentParser:
    """Build the parser of a command."""
    options, run = _COMMANDS[command]
    made = Parser(prog=f"llm2clip-vlm {command}", description=run.__doc__)
    options(made.add_argument)
    made.add_argument("--device", help="default: cuda if there is one, else cpu")
    return made


def main(command: str, words: Sequence[str]) -> int | None:
    """Run a command."""
    arguments = parser(command).parse_intermixed_args(words)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return _COMMANDS[command][1](arguments)


def _chat_options(add: Callable[..., object]) -> None:
    add("model", metavar="MODEL", help=_MODEL)
    add("image", metavar="IMAGE", nargs="?", help="picture to talk about")
    add("-p", "--prompt", metavar="TEXT", help="answer this one question")
    add("--max-new-tokens", type=number(1), default=512, metavar="N")
    add("--temperature", type=number(0, kind=float), default=0.0, metavar="T", help="0 = greedy")
    add("--top-p", type=number(0.001, 1, float), metavar="P", help="with a temperature")
    add("--repetition-penalty", type=number(0.001, kind=float), metavar="X")
    add("--seed", type=number(0, 2**32 - 1), default=0, help="of sampling (default: 0)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))


def _chat(arguments: argparse.Namespace) -> int:
    """Talk with a vision-language model in the terminal.

    Lines of a pipe are questions, too; with -p the answer alone is printed.
    """
    from transformers import set_seed

    from llm2clip_vlm.play.vlm_chat import HELP, Chat, open_picture, print_answer, talk, typed

    picture = open_picture(arguments.image) if arguments.image else None  # before the slow part
    how = {name: getattr(arguments, name) for name in ("dtype", "device", "max_new_tokens")}
    chat = Chat.load(arguments.model, **how)
    chat.show(picture)
    set_seed(arguments.seed)
    names = ("temperature", "top_p", "repetition_penalty")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.prompt is not None:
        print_answer(chat, arguments.prompt, options)
        return 0
    if sys.stdin.isatty():
        print(f"{arguments.model} on {chat.generator.model.device}. {HELP}.", file=sys.stderr)
    failed = talk(chat, typed(), options)
    return 2 if failed and not sys.stdin.isatty() else 0


def _search_options(add: Callable[..., object]) -> None:
    add("model", metavar="MODEL", help=f"an encoder: {_MODEL}")
    add("folder", metavar="FOLDER", help="photographs, also in folders below it")
    add("words", metavar="WORDS", nargs="*", help='such as "a dog in the snow"')
    add("-n", "--count", type=number(1), default=5, metavar="N", help="default: 5")
    add("--open", action="store_true", help="show the best one in a viewer")
    add("--text-encoder", metavar="DIR", help="of a model of stage 2b, if its manifest names none")


def _search(arguments: argparse.Namespace) -> int:
    """Find photographs by words.

    The folder is indexed once; later calls embed what is new. Without words, lines are searches.
    """
    import webbrowser

    _require_photos(arguments.folder)  # before the slow part
    from llm2clip_vlm.play.photo_index import index_photos, load_dual_encoder
    from llm2clip_vlm.play.vlm_chat import typed

    encoder = load_dual_encoder(arguments.model, arguments.text_encoder, arguments.device)
    index = index_photos(arguments.folder, encoder)
    print(index.summary(), file=sys.stderr)
    for words in [" ".join(arguments.words)] if arguments.words else typed():
        if not words.strip():
            continue
        found = index.best(encoder.embed_texts([words.strip()])[0], arguments.count)
        for score, path in found:
            print(f"{score:.3f}  {path}", flush=True)
        if arguments.open:
            webbrowser.open(found[0][1].as_uri())
    return 0


def _require_photos(folder: str) -> None:
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with photographs")


def _app_options(add: Callable[..., object]) -> None:
    add("run", metavar="RUN", nargs="?", help="folder with finished stages (default: runs/demo)")
    photos = "folder to search (default: `image_root` of the encoders' evaluation data)"
    models = {"--vlm": f"one more VLM: {_MODEL}", "--encoder": f"one more encoder: {_MODEL}"}
    for name, what in {**models, "--photos": photos}.items():
        add(name, metavar="DIR", action="append", default=[], help=what)
    add("--votes", metavar="FILE", help="default: RUN/votes.jsonl")
    add("--port", type=number(1, 65535), help="default: the first free one from 7860 on")
    add("--open", action="store_true", help="show it in the browser")


def _app(arguments: argparse.Namespace) -> None:
    """Serve one web page, on this machine alone.

    Chat with one or two VLMs, search photographs, see where words are in a picture, and finished
    runs. Without arguments it shows the demo's models.
    """
    from llm2clip_vlm.hub import require_place

    for place in (*arguments.vlm, *arguments.encoder):  # before the slow part
        require_place(place)
    for folder in arguments.photos:
        _require_photos(folder)
    from llm2clip_vlm.play.page import serve
    from llm2clip_vlm.play.shelf import DEFAULT_RUN, Shelf

    more = (arguments.vlm, arguments.encoder, arguments.photos)
    shelf = Shelf(arguments.run or DEFAULT_RUN, *more, arguments.votes, arguments.device)
    serve(shelf, arguments.port, open_browser=arguments.open)


_COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., int | None]]] = {
    "chat": (_chat_options, _chat),
    "search": (_search_options, _search),
    "app": (_app_options, _app),
}
