"""The entry point `lmms_eval.models` -> `llm2clip_vlm.evaluation.vlm:manifest`.

lmms-eval loads it whenever its models are imported, so it imports neither torch nor the adapter.
There is no alias on purpose: lmms-eval looks prompts up by the name that was typed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "llm2clip_vlm"
"""Name after `lmms-eval --model`, and key of a task's `lmms_eval_specific_kwargs`."""


def manifest() -> ModelManifest:
    """Names the adapter's class for lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "llm2clip_vlm.evaluation.vlm.adapter.Llm2ClipVlmChat"
    return ModelManifest(model_id=MODEL_ID, chat_class_path=path)
