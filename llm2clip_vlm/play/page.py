"""The page of `llm2clip-vlm app`: chat, search, look, and finished runs, on this machine alone.

It listens on the loopback address, shares and reports nothing, asks no other host for anything,
and keeps uploads in a folder that goes when it ends. Photographs are searched in the folders that
were named when it was started.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip_vlm.files import read_text
from llm2clip_vlm.play.shelf import Shelf
from llm2clip_vlm.play.similarity import similarity_maps
from llm2clip_vlm.play.vlm_chat import Chat, open_picture

UPLOAD_LIMIT = "20mb"
"""Largest file of a picture; its pixels are bounded where every picture is opened."""
_OFF = ("share", "mcp_server", "enable_monitoring", "run_history", "ssr_mode", "pwa")
"""What Gradio could do besides showing the page."""
_UPLOADS = "llm2clip_vlm-app-"
_BEST = 6
_THUMBNAIL_PX = 384
_NOBODY = "(none)"
_CSS = (
    "footer {display: none !important} iframe {width: 100%; height: 75vh; border: 0}"
    ".image-frame img {object-fit: contain !important}"  # as large as its place, if small itself
    ".grid-wrap {max-height: none !important}"  # all pictures, and their captions to the end
    ".caption-label {white-space: normal !important; max-width: 100% !important}"
)


def serve(shelf: Shelf, port: int | None = None, *, open_browser: bool = False) -> None:
    """Serve the page until Ctrl-C.

    Args:
        shelf: What it shows.
        port: None: the first free one from 7860 on.
        open_browser: Show it.

    Raises:
        ValueError: Gradio is not installed.
        OSError: The port is in use.
    """
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'llm2clip-vlm[app]'")
    with tempfile.TemporaryDirectory(prefix=_UPLOADS) as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio as gr

        with gr.Blocks(title="llm2clip-vlm", analytics_enabled=False) as page:
            for name, fill in _TABS.items():
                with gr.Tab(name):
                    fill(gr, shelf)
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=open_browser,
            strict_cors=True,
            max_file_size=UPLOAD_LIMIT,
            theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"),
            css=_CSS,
            quiet=True,
            prevent_thread_lock=True,
            **dict.fromkeys(_OFF, False),
        )
        print(f"{url} shows {shelf.run} on this machine alone; Ctrl-C ends it", flush=True)
        page.block_thread()


class _Talk:
    """One picture, and a conversation about it with each of one or two models."""

    def __init__(self, shelf: Shelf, path: str | None, names: list[str]) -> None:
        self.path, self.names = path, random.sample(names, len(names))
        self.picture = open_picture(path) if path else None
        self.chats = [Chat(shelf.chat(name).generator, self.picture) for name in self.names]

    def goes_on(self, path: str | None, names: list[str]) -> bool:
        """Whether a question about a picture to models belongs to it."""
        return self.path == path and sorted(self.names) == sorted(names)

    def ask(self, question: str, options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Ask one model after the other; a question that one could not take is none of the others'.

        Yields:
            Number of the model, and its answer so far.
        """
        fewest = min(len(chat.turns) for chat in self.chats)
        for side, chat in enumerate(self.chats):
            del chat.turns[fewest:]
            for answer in chat.ask(question, options):
                yield side, answer

    def shown(self) -> list[list[dict[str, str]]]:
        """Both columns, as Gradio's chatbot has messages."""
        return [*([*_messages(chat.turns)] for chat in self.chats), []][:2]

    def vote(self, shelf: Shelf, vote: str) -> str:
        """Keep a vote; then the names are told."""
        seen = self.picture and hashlib.sha256(self.picture.tobytes()).hexdigest()
        shelf.vote(self.names, vote, picture=seen, turns=[chat.turns for chat in self.chats])
        left, right = self.names
        return f"left: **{left}**, right: **{right}**. {shelf.tally(self.names)}"


def _messages(turns: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    for question, answer in turns:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}


def _chat_tab(gr: Any, shelf: Shelf) -> None:
    if not (names := list(shelf.vlms)):
        gr.Markdown("No VLM here: name one by `--vlm`.")
        return
    talk = gr.State()
    with gr.Row():
        with gr.Column(min_width=280):
            picture = _picture(gr)
            one, two = _two(gr, names, "model")
            with gr.Accordion("options", open=False):
                temperature = gr.Slider(0, 2, 0, step=0.1, label="temperature (0 = greedy)")
                tokens = gr.Slider(1, 512, 128, step=1, label="longest answer, in tokens")
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                # as text: a picture in Markdown could be on another host
                look = {"min_width": 240, "buttons": [], "render_markdown": False}
                columns = [gr.Chatbot(label=label, **look) for label in ("left", "right")]
            question = gr.Textbox(label="question", submit_btn=True, max_length=4000)
            with gr.Row(visible=False) as voting:
                buttons = {vote: gr.Button(text, min_width=80) for vote, text in _VOTES.items()}
            told, hidden = gr.Markdown(), gr.update(visible=False)

    def ask(
        talk: _Talk | None, path: str | None, one: str, two: str, question: str, *options: float
    ) -> Iterator[list[Any]]:
        wanted = [one] if two in (one, _NOBODY) else [one, two]
        with _as_message(gr):
            if not question.strip():
                raise ValueError("ask something")
            if talk is None or not talk.goes_on(path, wanted):
                talk = _Talk(shelf, path, wanted)
            given = {"temperature": options[0], "max_new_tokens": int(options[1])}
            box: Any = ""  # once the answer begins; what is typed from then on stays
            for side, answer in talk.ask(question, given):
                shown = talk.shown()
                shown[side] += _messages([(question, answer)])
                yield [talk, *shown, box, gr.skip(), ""]
                box = gr.skip()
            arena = len(talk.chats) == 2
            yield [talk, *talk.shown(), box, gr.update(visible=arena), _BLIND if arena else ""]

    def vote(which: str, talk: _Talk) -> list[Any]:
        with _as_message(gr):
            return [None, hidden, talk.vote(shelf, which)]

    asked = [talk, picture, one, two, question, temperature, tokens]
    question.submit(ask, asked, [talk, *columns, question, voting, told], show_progress="minimal")
    for which, button in buttons.items():
        button.click(partial(vote, which), [talk], [talk, voting, told])
    for column in columns:
        column.clear(lambda: [None, hidden, "", [], []], None, [talk, voting, told, *columns])
    two.change(lambda name: gr.update(visible=name != _NOBODY), [two], [columns[1]])


_VOTES = {"left": "left is better", "right": "right is better", "tie": "tie"}
_BLIND = "Which answers are better? A vote tells the names, and ends this conversation."


def _search_tab(gr: Any, shelf: Shelf) -> None:
    if not (shelf.encoders and shelf.photos):
        gr.Markdown("No encoder or no photographs here: name them by `--encoder` and `--photos`.")
        return
    with gr.Row():
        folder = gr.Dropdown(shelf.photos, value=shelf.photos[0], label="photographs")
        one, two = _two(gr, list(shelf.encoders), "encoder")
    words = gr.Textbox(label="words", submit_btn=True, max_length=4000)
    told = gr.Textbox(label="indexed", lines=1, max_lines=8)
    galleries, progress = _galleries(gr), gr.Progress(track_tqdm=True)

    def search(words: str, folder: str, one: str, two: str, shown: Any = progress) -> list[Any]:
        told: list[str] = []

        def best(name: str) -> list[Any]:
            if not words.strip():
                raise ValueError("type some words")
            text = shelf.encoder(name).embed_texts([words])[0]  # before the slow part
            index = shelf.index(name, folder)
            told.append(index.summary())
            return [(_thumbnail(p), f"{cos:.3f} {p.name}") for cos, p in index.best(text, _BEST)]

        return [*_of_each(gr, (one, two), best), told[0]]

    words.submit(search, [words, folder, one, two], [*galleries, told])


def _look_tab(gr: Any, shelf: Shelf) -> None:
    if not shelf.encoders:
        gr.Markdown("No encoder here: name one by `--encoder`.")
        return
    with gr.Row():
        with gr.Column(min_width=280):
            picture = _picture(gr)
        with gr.Column(scale=2, min_width=280):
            one, two = _two(gr, list(shelf.encoders), "encoder")
            words = gr.Textbox(label="words, with commas between", submit_btn=True, max_length=1000)
    galleries = _galleries(gr, columns=2)  # their captions are longer

    def look(path: str | None, words: str, *names: str) -> list[Any]:
        def maps(name: str) -> list[Any]:
            texts = [word.strip() for word in words.split(",") if word.strip()]
            if not path or not texts:
                raise ValueError("choose a picture and type some words")
            return similarity_maps(shelf.encoder(name), open_picture(path), texts)

        return _of_each(gr, names, maps)

    words.submit(look, [picture, words, one, two], galleries)


def _runs_tab(gr: Any, shelf: Shelf) -> None:
    import pandas as pd

    rows = []
    for run in shelf.runs:
        last = round(run.losses[-1][1], 3) if run.losses else None
        rows.append([run.name, run.stage, round(run.seconds / 60, 1), last])
    headers = ["run", "stage", "minutes", "last loss"]
    gr.Dataframe(rows, headers=headers, label="finished", interactive=False, wrap=True, buttons=[])
    with gr.Row():
        for stage in dict.fromkeys(run.stage for run in shelf.runs if run.losses):
            points = [(r.name, *at) for r in shelf.runs if r.stage == stage for at in r.losses]
            table = pd.DataFrame(points, columns=["run", "step", "loss"])
            look = {"label": f"loss of {stage}", "buttons": [], "min_width": 320}
            gr.LinePlot(table, x="step", y="loss", color="run", **look)
    pages = {f.relative_to(shelf.run).as_posix(): f for f in sorted(shelf.run.rglob("*.html"))}
    if pages:
        chosen = gr.Dropdown([_NOBODY, *pages], value=_NOBODY, label="report")
        frame = gr.HTML()
        chosen.change(lambda name: _framed(pages.get(name)), [chosen], [frame])


_TABS = {"chat": _chat_tab, "search": _search_tab, "look": _look_tab, "runs": _runs_tab}


def _picture(gr: Any) -> Any:
    sources = ["upload", "clipboard"]
    look = {"label": "picture", "height": 280, "buttons": []}
    shown = gr.Image(type="filepath", image_mode=None, sources=sources, **look)
    # The file as it came: Gradio would open it, and fail without a word on one that is no picture.
    shown.preprocess = lambda payload: payload and payload.path
    return shown


def _two(gr: Any, names: list[str], kind: str) -> tuple[Any, Any]:
    # the same stage of another arm, rather than another stage
    second = min(names[1:], key=lambda n: Path(n).parent != Path(names[0]).parent, default=_NOBODY)
    one = gr.Dropdown(names, value=names[0], label=kind)
    return one, gr.Dropdown([_NOBODY, *names], value=second, label=f"second {kind}")


def _galleries(gr: Any, columns: int = 3) -> list[Any]:
    look = {"columns": columns, "height": "auto", "object_fit": "contain", "buttons": []}
    some = {"visible": False, "interactive": False, "min_width": 280, **look}
    with gr.Row():
        return [gr.Gallery(**some) for _ in range(2)]


def _of_each(gr: Any, names: Sequence[str], show: Callable[[str], list[Any]]) -> list[Any]:
    """What a gallery of each encoder shows."""
    with _as_message(gr):
        found = {name: [] if name == _NOBODY else show(name) for name in names}
    return [gr.update(value=found[name], visible=bool(found[name]), label=name) for name in names]


def _thumbnail(path: Path) -> Image.Image:
    image = open_picture(path)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return image


def _framed(page: Path | None) -> str:
    """A report in a frame that may run nothing."""
    return f'<iframe sandbox="" srcdoc="{escape(read_text(page))}"></iframe>' if page else ""


@contextmanager
def _as_message(gr: Any) -> Iterator[None]:
    """What the user can mend becomes a message on the page."""
    try:
        yield
    except (ValueError, OSError) as error:  # the boundary around a request
        told = re.sub(rf" below [^\s:]*{_UPLOADS}[^\s:]*", "", str(error))
        raise gr.Error(told, print_exception=False) from error
