"""Examples of the report, in a process that has loaded nothing of ours before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from tests.tiny import clip_config, write_image

FRESH = """
import sys
from pathlib import Path
from llm2clip_vlm.data.image_text.index import ImageTextRecord
from llm2clip_vlm.evaluation.report.examples import retrieved_captions
from llm2clip_vlm.evaluation.report.inputs import ReportError

folder = Path(sys.argv[1])
record = ImageTextRecord("k", "a.png", {"short": ["a dog"]}, folder)
try:
    retrieved_captions({"m": folder}, [record], "short", 1, None)
except ReportError as error:
    print(error)
"""


def test_an_llm2clip_model_is_known_in_a_fresh_process(tmp_path: Path, repo_root: Path) -> None:
    vision = clip_config(20).vision_config.to_dict()
    config = LLM2CLIPConfig(vision_config=vision, text_embed_dim=8, projection_dim=6)
    LLM2CLIPModel(config).save_pretrained(tmp_path)
    write_image(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "captions need stage 2a's directory" in done.stdout, done.stderr[-2000:]
