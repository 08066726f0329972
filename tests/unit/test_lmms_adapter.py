"""The adapter with hand-made requests; lmms-eval's evaluator is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")

from lmms_eval.api.instance import Instance

from llm2clip_vlm.evaluation.vlm import MODEL_ID, manifest
from llm2clip_vlm.evaluation.vlm.adapter import Llm2ClipVlmChat
from llm2clip_vlm.models.vlm.building import build_vlm, load_checkpoint
from tests.tiny import write_image

DOCS = [{"question": f"is there a {word} ?", "seed": n} for n, word in enumerate(["dog", "cat"])]
OPTIONS = {"max_new_tokens": 4, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def checkpoint(tiny_clip: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    for part in build_vlm(tiny_clip, tiny_llm):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def live(checkpoint: Path) -> dict[str, Any]:
    model, processor = load_checkpoint(str(checkpoint), device="cpu")
    return {"model": model, "processor": processor}


@pytest.fixture
def visual(tmp_path: Path) -> Any:
    from PIL import Image

    def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
        return [Image.open(write_image(tmp_path / f"{doc['seed']}.png", doc["seed"]))]

    return doc_to_visual


def texts_of(
    adapter: Any, visual: Any, options: Any = lambda n: OPTIONS, value: Any = lambda r: r.text
) -> list[Any]:
    def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": image} for image in visual(doc)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]

    adapter.task_dict = {"t": {"test": DOCS}}
    meta = {"task": "t", "doc_id": 0, "repeats": 1}
    asked = [
        Instance(
            request_type="generate_until",
            arguments=("unused", to_messages, options(n), n, "t", "test"),
            idx=0,
            metadata=meta,
        )
        for n in range(len(DOCS))
    ]
    return [value(result) for result in adapter.generate_until(asked)]


def test_answers_that_the_limit_cut_are_counted(live: dict[str, Any], visual: Any) -> None:
    adapter = Llm2ClipVlmChat(**live)
    adapter.generator.eos_ids = []
    texts_of(adapter, visual, lambda n: {"max_new_tokens": 4})
    assert adapter.num_cut == 2
    first = texts_of(adapter, visual, lambda n: {"max_new_tokens": 4})[0]
    texts_of(adapter, visual, lambda n: {"max_new_tokens": 4, "until": [first[1] * (n == 0)]})
    assert adapter.num_cut == 1


def test_a_live_adapter_survives_clean(live: dict[str, Any], visual: Any) -> None:
    chat = Llm2ClipVlmChat(**live)
    assert not chat.is_simple
    first = texts_of(chat, visual)
    assert all(first)
    assert "<image>" in chat.prompt_example and "dog" in chat.prompt_example
    chat.clean()
    assert texts_of(chat, visual) == first
    assert live["model"].device.type == "cpu"


def test_pretrained_gives_the_same_and_says_so_when_it_was_cleaned(
    checkpoint: Path, live: dict[str, Any], visual: Any
) -> None:
    loaded = Llm2ClipVlmChat(pretrained=str(checkpoint), batch_size="2", device="cpu")
    assert texts_of(loaded, visual) == texts_of(Llm2ClipVlmChat(**live), visual)
    loaded.clean()
    with pytest.raises(RuntimeError, match="cleaned"):
        texts_of(loaded, visual)


def test_options_reach_the_generator(checkpoint: Path) -> None:
    adapter = Llm2ClipVlmChat(
        pretrained=str(checkpoint), batch_size=3, max_new_tokens=7, dtype="bfloat16", device="cpu"
    )
    generator = adapter.generator
    assert generator is not None
    assert (generator.batch_size, generator.max_new_tokens) == (3, 7)
    assert str(generator.model.dtype) == "torch.bfloat16"


def test_text_only_documents_are_answered(live: dict[str, Any]) -> None:
    assert all(texts_of(Llm2ClipVlmChat(**live), lambda doc: []))


def test_each_question_gets_the_picture_of_another(live: dict[str, Any], visual: Any) -> None:
    shown: list[list[Any]] = []
    adapter = Llm2ClipVlmChat(**live)
    generate = adapter.generator.generate
    adapter.generator.generate = lambda prompts, *rest: (
        shown.append([(prompt.text, prompt.pictures) for prompt in prompts]),
        generate(prompts, *rest),
    )[1]
    texts_of(adapter, visual)
    own = dict(adapter.pictures)
    adapter.other_pictures = True
    texts_of(adapter, visual)
    (dog, first), (cat, second) = shown[0]
    assert first != second and shown[1] == [(dog, second), (cat, first)]
    assert adapter.pictures == own, "samples are paired by the question's own picture"
    with pytest.raises(ValueError, match="documents with different pictures, got 2"):
        texts_of(adapter, lambda doc: visual(DOCS[0]))
    assert all(texts_of(adapter, lambda doc: []))


def test_a_document_with_more_pictures_than_any_other_gets_those_of_several(
    live: dict[str, Any], visual: Any
) -> None:
    adapter = Llm2ClipVlmChat(**live)
    text, pictures = {"type": "text", "text": "?"}, [visual(doc)[0] for doc in DOCS]

    def messages(doc: list[int]) -> list[Any]:
        images = [{"type": "image", "url": pictures[n]} for n in doc]
        return [{"role": "user", "content": [*images, text]}]

    render, documents = adapter.generator.render, [[0, 1, 0], [0], [1]]
    for doc, seen in ((0, [1, 0, 0]), (1, [1]), (2, [0])):
        other = adapter._elsewhere(render(messages(documents[doc])), messages, documents, doc)
        assert other.text == render(messages(documents[doc])).text
        assert other.pictures == render(messages(seen)).pictures
    with pytest.raises(ValueError, match="different pictures"):
        adapter._elsewhere(render(messages([0, 0])), messages, [[0, 0], [0]], 0)


def test_many_documents_are_rendered_a_few_batches_at_a_time(
    live: dict[str, Any], monkeypatch: pytest.MonkeyPatch, visual: Any
) -> None:
    from llm2clip_vlm.evaluation.vlm import adapter as lmms_adapter

    whole = texts_of(Llm2ClipVlmChat(**live), visual)
    monkeypatch.setattr(lmms_adapter, "_BATCHES_AT_ONCE", 1)
    adapter = Llm2ClipVlmChat(**live, batch_size=1)
    sizes = []
    generate = adapter.generator.generate
    adapter.generator.generate = lambda prompts, *rest: (
        sizes.append(len(prompts)),
        generate(prompts, *rest),
    )[1]
    assert texts_of(adapter, visual) == whole and sizes == [1, 1]


def test_unsupported_requests_and_bad_arguments_are_refused(live: dict[str, Any]) -> None:
    chat = Llm2ClipVlmChat(**live)
    for asked in (chat.loglikelihood, chat.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="single-round generation"):
            asked([])
    with pytest.raises(ValueError, match="either `pretrained`"):
        Llm2ClipVlmChat()
    with pytest.raises(ValueError, match="either `pretrained`"):
        Llm2ClipVlmChat(pretrained="x", **live)
    with pytest.raises(TypeError, match="unknown_option"):
        Llm2ClipVlmChat(pretrained="x", unknown_option=1)


def test_a_checkpoint_with_missing_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of LlavaForConditionalGeneration are missing"):
        load_checkpoint(str(broken), device="cpu")


def test_the_manifest_names_the_class_without_an_alias_and_without_torch() -> None:
    found = manifest()
    assert found.model_id == MODEL_ID == "llm2clip_vlm" and found.aliases == ()
    assert found.chat_class_path.endswith(".Llm2ClipVlmChat") and not found.simple_class_path
    code = (
        "import sys\n"
        "from llm2clip_vlm.evaluation.vlm import manifest\n"
        "manifest()\n"
        "from lmms_eval.models.registry_v2 import ModelRegistryV2\n"
        "assert 'torch' not in sys.modules\n"
        "registry = ModelRegistryV2()\n"
        "registry.register_manifest(manifest())\n"
        "assert not registry.get_model_class('llm2clip_vlm').is_simple\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_every_document_has_its_own_options_and_picture_in_every_batch(
    live: dict[str, Any], monkeypatch: pytest.MonkeyPatch, visual: Any
) -> None:
    from llm2clip_vlm.evaluation.vlm import adapter as lmms_adapter

    monkeypatch.setattr(lmms_adapter, "_BATCHES_AT_ONCE", 1)
    adapter = Llm2ClipVlmChat(**live, batch_size=1)
    adapter.generator.eos_ids = []

    def counts(visuals: Any) -> list[int]:
        options = [{"max_new_tokens": 2 + n} for n in range(len(DOCS))]
        return texts_of(
            adapter, visuals, options.__getitem__, lambda r: r.token_counts.output_tokens
        )

    assert counts(visual) == [2, 3]
    assert len(set(adapter.pictures.values())) == 2 and set(adapter.pictures) == {0, 1}
    assert counts(lambda doc: visual(doc) if doc["seed"] else []) == [2, 3]
    assert set(adapter.pictures) == {1}  # of this task alone, text without a picture has none
