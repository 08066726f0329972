"""Vision tower, projector and language model as one Hugging Face LLaVA, from step 0.

Everything trains inside `transformers.LlavaForConditionalGeneration` (with AnyRes
`LlavaNextForConditionalGeneration`), so every checkpoint is the export: there is no other format
to convert.

Paper: LLaVA-1.5 (2310.03744) section 3; module names as transformers 5 has them.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from llm2clip_vlm.chat.labels import end_of_turn_ids, tokenize
from llm2clip_vlm.chat.template import accept_image_parts, find_chat_template, render
from llm2clip_vlm.constants import IMAGE_TOKEN
from llm2clip_vlm.distributed import find_device
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.equal import vlm_difference, vlm_outputs
from llm2clip_vlm.models.llm2clip import register
from llm2clip_vlm.models.loading import (
    boundary,
    four_bits,
    load_complete,
    read_config,
    read_processor,
    read_tokenizer,
)
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.trainable import matching_prefix
from llm2clip_vlm.models.vision.image_mode import (
    AspectRatio,
    anyres_image_processor,
    set_image_aspect_ratio,
)
from llm2clip_vlm.models.vision.towers import (
    is_feature_map_checkpoint,
    load_vision_tower,
    run_on_shapes,
)
from llm2clip_vlm.models.vlm.composing import VLM_CLASSES, compose
from llm2clip_vlm.models.vlm.lineage import (
    PROJECTOR,
    read_lineage,
    refuse_other,
    require_processor,
    settings_of,
    weights_of,
    write_lineage,
)
from llm2clip_vlm.models.vlm.system_prompt import with_system_prompt
from llm2clip_vlm.models.vlm.vlm_gradients import install_text_only_guard
from llm2clip_vlm.runs.manifest import refuse_bidirectional

logger = logging.getLogger(__name__)


def build_vlm(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    image_size_px: int | None = None,
    image_aspect_ratio: AspectRatio | Literal["anyres"] = "square",
    image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
    chat_template: str | None = None,
    system_prompt: str | None = None,
    extra_tokens: Sequence[str] = (),
    dtype: Any = None,
    projector: str | Path | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Composes a LLaVA from a vision tower and a causal language model.

    The projector is new (`Linear-GELU-Linear`, torch's default initialisation, as in LLaVA's
    `mlp2x_gelu`); everything else keeps its weights. `<image>` becomes a special token; the
    embedding rows of new tokens are the mean of the old ones.

    Args:
        vision_tower: See :func:`~llm2clip_vlm.models.vision.towers.load_vision_tower`.
        language_model: Directory or hub id of a causal LLM with a fast tokenizer.
        vision_feature_layer: Index into the tower's hidden states (LLaVA-1.5: -2), or several,
            whose features are concatenated. A CNN has one hidden state, its last map: -1 alone.
        vision_feature_select_strategy: `default` drops the CLS token where the tower has one,
            `full` keeps all. Registers (DINO) are kept by both.
        image_size_px: See `load_vision_tower`.
        image_aspect_ratio: `square` as the tower's processor crops, `pad` to the mean colour,
            `anyres` also in crops (LLaVA-NeXT; the model is a `LlavaNextForConditionalGeneration`,
            whose `image_newline` is new).
        image_grid_pinpoints: See :func:`~.image_mode.anyres_image_processor`; only with `anyres`.
        chat_template: See :func:`~llm2clip_vlm.chat.template.find_chat_template`.
        system_prompt: See :func:`~.system_prompt.with_system_prompt`.
        extra_tokens: Tokens that texts may use; new ones are added.
        dtype: Dtype of all weights. None or `"auto"`: that of the language model, fp32 for fp16.
        projector: VLM checkpoint whose projector is taken. None: a new one.
        seed: Seed of a new projector.

    Returns:
        The model in evaluation mode, the text-only guard installed, and its processor.

    Raises:
        ModelError: The language model is no causal LLM or incomplete, or its logits would change
            inside LLaVA; the layer does not exist, or AnyRes is asked to keep the CLS token; see
            `load_vision_tower` and `anyres_image_processor`.
        HandoffError: The language model was made bidirectional (a stage 1 text encoder), or the
            projector was trained beside another tower, LLM, template, layer or image mode.
        ConversationError: There is no chat template, or it takes no such system prompt.

    Paper: LLaVA-1.5 section 3.2 (MLP projector); LLaVA-NeXT (AnyRes).
    """
    if is_feature_map_checkpoint(vision_tower):
        _check_layers(1, vision_feature_layer, vision_tower)  # before minutes of loading
    llm, tokenizer, template = _load_language_model(str(language_model), dtype, chat_template)
    tower = load_vision_tower(vision_tower, dtype=llm.dtype, image_size_px=image_size_px)
    with boundary(f"{vision_tower}: LLaVA calls its tower with return_dict=True (take **kwargs)"):
        run_on_shapes(tower.model, tower.image_size_px, return_dict=True)
    _check_layers(tower.num_hidden_layers + 1, vision_feature_layer, vision_tower)
    if not tower.has_cls_token:
        vision_feature_select_strategy = "full"  # transformers' `default` would drop a patch
    template = accept_image_parts(template, tokenizer)
    image_token_id = _add_tokens(tokenizer, llm, extra_tokens)
    template = with_system_prompt(template, system_prompt, tokenizer)
    _as_trained(tokenizer, template)
    dropped = vision_feature_select_strategy == "default"
    image_processor, model_type = tower.image_processor, "llava"
    processor_class: Any = LlavaProcessor
    settings: dict[str, Any] = {
        "image_token_index": image_token_id,
        "image_seq_length": tower.num_patches + tower.num_prefix_tokens - dropped,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
    }
    if image_aspect_ratio == "anyres":
        if tower.has_cls_token and not dropped:
            raise ModelError(
                f"vision_feature_select_strategy: anyres puts crops side by side and cannot keep "
                f"their CLS tokens; expected default, got {vision_feature_select_strategy}"
            )
        model_type, processor_class = "llava_next", LlavaNextProcessor
        image_processor = anyres_image_processor(tower, image_grid_pinpoints)
        settings["image_grid_pinpoints"] = image_processor.image_grid_pinpoints
    model = compose(model_type, settings, tower.model, llm, seed=seed, path=language_model)
    model.generation_config = _generation_config(llm, tokenizer, template)
    processor = processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size_px,
        vision_feature_select_strategy=vision_feature_select_strategy,
        num_additional_image_tokens=tower.num_prefix_tokens,
        chat_template=template,
    )
    if image_aspect_ratio == "pad":
        set_image_aspect_ratio(processor, "pad")
    if projector is not None:
        _take_projector(model, processor, projector)
    install_text_only_guard(model)
    return model.eval(), processor


def load_vlm(
    path_or_id: str | Path,
    *,
    dtype: Any = "auto",
    load_in_4bit: bool = False,
    device: Any = None,
    check: Callable[[Any], object] = lambda _: None,
) -> tuple[Any, Any]:
    """Loads a LLaVA checkpoint completely, or says why not.

    Args:
        path_or_id: Directory or hub id of a `LlavaForConditionalGeneration` or a
            `LlavaNextForConditionalGeneration`.
        dtype: Dtype of all weights; `"auto"` = the checkpoint's dtype.
        load_in_4bit: Quantise the language model's linear weights to NF4 (needs bitsandbytes).
        device: Where the weights go with `load_in_4bit`; else the CPU.
        check: Takes a copy of the processor before the weights are loaded, which takes minutes.

    Returns:
        The model in evaluation mode with the text-only guard, and its processor.

    Raises:
        ModelError: It is no LLaVA, weights are missing, or its processor is another model's.
        HandoffError: Its decoder is bidirectional, or its projector was trained otherwise.
    """
    path = str(path_or_id)
    register()  # only this package may know the tower's `model_type`
    config = read_config(path)
    if config.model_type not in VLM_CLASSES:
        raise ModelError(
            f"{path}: model_type {config.model_type!r}, expected {' or '.join(VLM_CLASSES)}; a VLM "
            "checkpoint is stage 3's or stage 4's `model/`, or any LLaVA directory of transformers"
        )
    refuse_bidirectional(config.text_config, path)
    processor: Any = read_processor(path)
    check(copy.deepcopy(processor))
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    bits = four_bits(device, skip=kept) if load_in_4bit else {}
    kind = VLM_CLASSES[config.model_type]
    model: Any = load_complete(kind, path, config=config, dtype=dtype, **bits)
    require_processor(model.eval(), processor, path)
    install_text_only_guard(model)
    return model, processor


def load_checkpoint(
    pretrained: str, *, dtype: str = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load any vision-language model (in evaluation mode) and its processor, to ask it something.

    Args:
        pretrained: Directory or hub id.
        dtype: `auto` keeps that of the checkpoint; `float32` or `bfloat16` convert.
        device: Where it goes. None: `cuda` if there is one, else `cpu`.

    Raises:
        ValueError: Weights are missing, or a LLaVA's processor or settings are another model's.
    """
    register()  # only this package, or another one, may know the tower's `model_type`
    chosen = find_device(device)
    model = load_complete(AutoModelForImageTextToText, pretrained, dtype=dtype).to(chosen).eval()
    processor = read_processor(pretrained)
    if model.config.model_type in VLM_CLASSES:
        require_processor(model, processor, pretrained)
    return model, processor


def save_vlm(
    model: Any,
    processor: Any,
    directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    outputs: Tensor | None = None,
) -> None:
    """Writes weights, configs, processor and chat template as one loadable checkpoint.

    The weights are named as in published LLaVA checkpoints, however the model was made: composed
    or loaded under ZeRO-3 it would be saved with tower names that transformers 4 does not know and
    fills with random weights in silence. What was written is loaded again and must compute the
    same.

    Args:
        model: The model.
        processor: Its processor.
        directory: Where to write; made if absent.
        state_dict: Weights by their names in memory, where the model holds shards.
        outputs: Outputs that it must compute (`vlm_outputs`). None: those of the model; nothing is
            compared if there is a `state_dict`.

    Raises:
        ModelError: What was written computes something else.
    """
    _as_trained(processor.tokenizer, processor.chat_template)
    save_tokenizer(processor, directory)
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    model.save_pretrained(str(directory), state_dict=None if state_dict is None else state)
    if len(dtypes := {t.dtype for t in state.values() if t.is_floating_point()}) == 1:
        for config in (model.config, model.config.text_config, model.config.vision_config):
            (config.dtype,) = dtypes  # of what is saved; in memory a part that trained may differ
        model.config.save_pretrained(str(directory))
    write_lineage(directory, model, processor, state)
    if outputs is None and state_dict is None:
        outputs = vlm_outputs(model)
    if outputs is not None and (wrong := vlm_difference(outputs, load_vlm(directory)[0])):
        raise ModelError(f"{directory}: loaded again it computes something else: {wrong}")


def _load_language_model(path: str, dtype: Any, chat_template: str | None) -> tuple[Any, Any, str]:
    config = read_config(path)
    refuse_bidirectional(config, path)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{path}: AutoModelForCausalLM has no class for {config.model_type!r}")
    tokenizer = read_tokenizer(path)
    template = find_chat_template(chat_template, tokenizer)  # before minutes of loading
    llm = load_complete(AutoModelForCausalLM, path, config=config, dtype=dtype or "auto")
    if dtype in (None, "auto") and llm.dtype == torch.float16:
        logger.warning("%s: float16, in which nothing trains safely, becomes float32", path)
        llm.float()
    head = llm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{path}: LLaVA needs a language model with an lm_head without bias")
    if tokenizer.pad_token is None:
        # Padding is masked and never a label, so sharing a token with unk or eos does no harm.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return llm, tokenizer, template


def _check_layers(total: int, layers: int | list[int], path: str | Path) -> None:
    if total == 1 and layers != -1:
        raise ModelError(
            f"vision_feature_layer {layers}: {path} is a convolutional network, only its last "
            "map has the shape of the tokens; put `vlm.vision_feature_layer: -1` into the recipe"
        )
    chosen = [layers] if isinstance(layers, int) else layers
    if not chosen or any(not -total <= layer < total for layer in chosen):
        raise ModelError(
            f"vision_feature_layer {layers}: {path} has {total} hidden states "
            f"({-total} to {total - 1})"
        )


def _take_projector(model: Any, processor: Any, path: str | Path) -> None:
    """Take another VLM's projector, if it was trained beside the same parts."""
    if (recorded := read_lineage(path)) is None:
        raise ModelError(f"{path}: expected a VLM of stage 3 or 4 with lineage.json, found none")
    here = weights_of(model.state_dict()) | settings_of(model, processor)
    here.pop(PROJECTOR)
    refuse_other(path, recorded, here)
    given = load_vlm(path, dtype=model.dtype)[0].state_dict()
    for name, parameter in model.named_parameters():
        if matching_prefix(name, [PROJECTOR]):
            parameter.data.copy_(given[name])


def _keep_whole(tokenizer: Any, words: Sequence[str]) -> None:
    """Makes words ordinary tokens of a tokenizer, whether or not it had them as special ones."""
    if not words:
        return
    own = {IMAGE_TOKEN, "", *map(str, tokenizer.special_tokens_map.values())}
    if refused := own & {*words, *(word.strip() for word in words)}:
        raise ModelError(f"extra_tokens: expected tokens of no use yet, got {sorted(refused)}")
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    tokenizer.extra_special_tokens = [token for token in extra if token not in words]
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in whole["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in words
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])


def _add_tokens(tokenizer: Any, llm: Any, words: Sequence[str]) -> int:
    """Makes words and `<image>` tokens; new rows, in reserve or not, become the mean of the old."""
    known = {*tokenizer.get_vocab().values()}
    _keep_whole(tokenizer, words)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], True)
    rows = llm.get_input_embeddings().weight.shape[0]
    new = sorted({*tokenizer.get_vocab().values()} - known | {*range(rows, len(tokenizer))})
    if len(tokenizer) > rows:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        parts = (llm.get_input_embeddings(), llm.get_output_embeddings()) if new else ()
        for weight in (part.weight for part in parts):
            weight[new] = weight[: new[0]].float().mean(0).to(weight.dtype)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _as_trained(tokenizer: Any, template: str) -> None:
    """Makes the tokenizer add no more by itself than training keeps: no second bos, no eos.

    Everything here asks for that. Other programs, such as lmms-eval's `llava_hf` and transformers'
    pipeline, do not ask: they would give the model two bos, or an eos before it answers.
    """
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    text = render([message], template, tokenizer)
    if tokenizer(text)["input_ids"] == (ids := tokenize(tokenizer, text)[0]):
        return
    front = ids[: len(ids) - len(tokenizer(text, add_special_tokens=False)["input_ids"])]
    backend, names = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(front)
    before = json.loads(backend.to_str())["post_processor"] or {}
    kept = [s for s in before.get("processors", [before]) if s.get("type") == "ByteLevel"]
    special = [*zip(names, front, strict=True)]
    backend.post_processor = TemplateProcessing([*names, "$A"], special_tokens=special)
    whole = json.loads(backend.to_str())
    whole["post_processor"] = {"type": "Sequence", "processors": [*kept, whole["post_processor"]]}
    backend.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor
    tokenizer.init_kwargs |= {"add_bos_token": bool(front), "add_eos_token": False}


def _generation_config(llm: Any, tokenizer: Any, template: str) -> GenerationConfig:
    config = copy.deepcopy(llm.generation_config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = [*dict.fromkeys([*end_of_turn_ids(template, tokenizer), *known])]
    ids = [token for token in ids if token is not None]
    config.eos_token_id = ids if len(ids) > 1 else ids[0]
    config.bos_token_id = tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config
