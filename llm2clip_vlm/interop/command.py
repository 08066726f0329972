"""`llm2clip-vlm export` and `llm2clip-vlm convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llm2clip_vlm.options import Parser, number
from llm2clip_vlm.recipe.yaml_files import parse_value

FORMATS = ("transformers", "llava", "open_clip", "timm", "sentence-transformers", "vllm")
"""Same as `interop.export.FORMATS`, which takes seconds to import."""


def parser(command: str) -> argparse.ArgumentParser:
    """The options of `export` or `convert`."""
    made = Parser(prog=f"llm2clip-vlm {command}")
    add = made.add_argument
    if command == "export":
        made.description = "Write a checkpoint for another tool, open it there, and compare."
        add("checkpoint", metavar="CHECKPOINT", help="a model directory or a stage's")
        add("--to", required=True, choices=FORMATS, help="the tool")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="of a VLM's weights")
        earlier = "an earlier export in OUT that nobody has changed"
        add("--replace", dest="renew", action="store_true", help=earlier)
    else:
        made.description = (
            "Make a checkpoint of this package from LLM2CLIP's, open_clip's, timm's, LLaVA's or "
            "transformers'; what it is is read off its weights."
        )
        add("path", metavar="IN", help="a file, a folder, or a hub id")
        add("--vision-tower", metavar="DIR", help="of a LLaVA that keeps it apart")
        add("--language-model", metavar="DIR", help="of an mm_projector.bin")
        add(
            "--set", dest="settings", metavar="KEY=VALUE", type=setting, action="append",
            default=[], help="a field of the tower's config that the file does not say"
        )  # fmt: skip
        add("--image-size", type=number(1), metavar="PX", help="the same as --set image_size=PX")
        add("--partial", action="store_true", help="let weights be missing or unexpected")
        add("--sha256", help="hash that the file must have")
        runs = "run the Python files beside the weights, to compare with what they compute"
        add("--trust-remote-code", action="store_true", help=runs)
    add("out", metavar="OUT", help="folder to write; must not exist")
    return made


def main(command: str, words: Sequence[str]) -> int:
    """Run `export` or `convert`, and print the certificate's checks."""
    given = vars(parser(command).parse_args(words))
    if command == "export":
        from llm2clip_vlm.interop.export import export

        certificate = export(**given)
    else:
        from llm2clip_vlm.interop.convert import convert

        side = given.pop("image_size")
        given["settings"] = dict(given["settings"]) | ({} if side is None else {"image_size": side})
        certificate = convert(**given)
        print(f"format {certificate['format']}: {certificate.get('keys', {})}")
    if rounding := certificate.get("rounding"):
        moved = "{max_difference:.3g} of {largest_value:.3g}".format(**rounding)
        same = f"{rounding['same_first_token']:.0%} of the most likely tokens stay"
        print(f"rounded to {rounding['to']}: logits move by up to {moved}, {same}")
    for name, check in certificate["checks"].items():
        print(f"{name}: max difference {check['max_difference']:.3g}, {certificate['opened_with']}")
    for word in ("lost", "guessed"):
        if word in certificate:
            print(f"{word}: {certificate[word]}")
    print(f"{given['out']} written, with parity.json")
    return 0


def setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, the value written as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text}")
    return key, parse_value(value, f"--set {key}")
