"""All of an exported folder that is not a graph: what onnxruntime-genai, transformers.js and transformers read.

Three programs find their settings in one folder. Where two read a file of the same name in different ways, or one reads
a file that no other does, the docstrings here say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.data.jinja import exported_template
from lavintk.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lavintk.data.images import ImageProcessor

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PLACEHOLDER = VISION_START + IMAGE_PAD + VISION_END
"""Text of the one token that stands for a visual token; written once in a prompt, it stands for an image."""
OGA_PROCESSOR = "ort_processor_config.json"
"""``processor_config.json``, which onnxruntime-genai reads by itself, is the name of another file of transformers'."""
DTYPES = {"": "fp32", "_fp16": "fp16", "_int8": "int8", "_q4": "q4", "_bnb4": "bnb4"}
"""transformers.js' names of what the suffix of a graph's file name says."""
SESSIONS = {"decoder": "decoder_model_merged", "vision": "vision_encoder", "embed_tokens": "embed_tokens"}
"""transformers.js' names of the graphs of a model with vision, by ours."""
MAX_LENGTH = 2048
"""Tokens of prompt and answer for which onnxruntime-genai reserves a cache unless it is asked for another number."""
MAX_NEW_TOKENS = 256
"""Tokens of an answer, at most, unless transformers.js or transformers is asked for another number."""
_IDLE = (
    "_name_or_path", "quantization_config", "torch_dtype", "dtype", "_attn_implementation", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
)  # fmt: skip
"""Entries of a configuration that belong to the files it came from or to other tasks."""
_NEAREST, _LANCZOS = 0, 1
_OGA_FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC", 4: "LINEAR", 5: "LINEAR"}
"""By Pillow's numbers. Box and Hamming are unknown there; linear is between the two."""


@dataclass(frozen=True)
class FolderDescription:
    """What the files of an exported folder say.

    :param config: the language model's.
    :param tokenizer: as the model was trained with.
    :param template: as :attr:`lavintk.data.template.Template.kind`: ``chat``, ``plain``, ``lavin`` or a Jinja file.
    :param system: the system message of conversations that bring none.
    :param stop_ids: ids that end an answer, the first one preferred; as ``Template.stop_ids``.
    :param context_length: tokens that the decoder reaches.
    :param graphs: paths of the graphs below the folder by role: ``decoder`` (the one for images where there are two),
        and with vision ``vision``, ``embed_tokens`` and ``embedding``. Files end in a key of :data:`DTYPES`.
    :param data_files: number of external data files of each graph that has any, by path. The first is called like the
        graph with ``_data`` behind it, the next ``_data_1``, as transformers.js expects.
    :param images: how pictures are prepared; None for a model without vision.
    :param visual_tokens: visual tokens per image.
    :param vision: the tower's configuration, for the record in ``config.json``.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template: str
    stop_ids: tuple[int, ...]
    context_length: int
    graphs: Mapping[str, str]
    data_files: Mapping[str, int] = field(default_factory=dict)
    system: str | None = None
    images: ImageProcessor | None = None
    visual_tokens: int = 0
    vision: PretrainedConfig | None = None

    @property
    def placeholder_id(self) -> int:
        """Id of the image placeholder: the first one without a row in the output head, so it cannot be sampled."""
        return int(self.config.vocab_size)


def write_folder(out: Path, description: FolderDescription) -> None:
    """Write everything into ``out`` that is not a graph.

    :raises ModelError: the tokenizer or its template cannot be written down for other programs.
    """
    files: dict[str, Any] = {
        "config.json": model_config(description),
        "generation_config.json": generation_config(description),
        "genai_config.json": genai_config(description),
        "tokenizer.json": tokenizer_file(description),
        "tokenizer_config.json": tokenizer_config(description),
    }
    if description.images is not None:
        files["tokenizer_module.json"] = tokenizer_module(description)
        files["preprocessor_config.json"] = preprocessor_config(description.images)
        files["processor_config.json"] = processor_config(description)
        files[OGA_PROCESSOR] = oga_processor(description.images)
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 2
        (out / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    template = files["tokenizer_config.json"]["chat_template"]
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def model_config(description: FolderDescription) -> dict[str, Any]:
    """Return ``config.json``: the language model's own, or LLaVA's around it, with the hints for transformers.js."""
    config = _plain_config(description.config)
    heads = description.config.num_attention_heads
    config["head_dim"] = getattr(description.config, "head_dim", None) or description.config.hidden_size // heads
    config["eos_token_id"] = list(description.stop_ids)
    if description.images is not None:
        text = {**config, "eos_token_id": description.stop_ids[0]}
        config = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": description.placeholder_id,
            "image_seq_length": description.visual_tokens,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
            "text_config": text,
            "vision_config": _vision_config(description),
        }
    return {**config, "transformers.js_config": _hints(description)}


def _plain_config(config: PretrainedConfig) -> dict[str, Any]:
    content: dict[str, Any] = config.to_dict()
    return {name: value for name, value in content.items() if name not in _IDLE}


def _vision_config(description: FolderDescription) -> dict[str, Any]:
    assert description.images is not None
    if description.vision is not None:
        return _plain_config(description.vision)
    return {"model_type": "clip_vision_model", "image_size": description.images.height}


def _hints(description: FolderDescription) -> dict[str, Any]:
    """Return which files transformers.js has to load; without it, it looks for fp32 weights in one file."""
    if description.images is None:
        sessions = {"model": description.graphs["decoder"]}
    else:
        sessions = {session: description.graphs[role] for role, session in SESSIONS.items()}
    dtypes = {session: _dtype(path, session) for session, path in sessions.items()}
    counts = {Path(path).name: description.data_files.get(path, 0) for path in sessions.values()}
    same = len(set(dtypes.values())) == 1
    return {
        "dtype": next(iter(dtypes.values())) if same else dtypes,
        "use_external_data_format": {name: count for name, count in counts.items() if count} or False,
    }


def _dtype(path: str, session: str) -> str:
    suffix = Path(path).stem.removeprefix(session)
    if suffix not in DTYPES:
        raise ModelError(f"transformers.js would not find {path}: it looks for {session} and one of {list(DTYPES)}")
    return DTYPES[suffix]


def generation_config(description: FolderDescription) -> dict[str, Any]:
    """Return ``generation_config.json``: greedy, as models are evaluated."""
    tokenizer = description.tokenizer
    bos = {} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id}
    return {
        **bos,
        "eos_token_id": list(description.stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def genai_config(description: FolderDescription) -> dict[str, Any]:
    """Return ``genai_config.json``; onnxruntime-genai refuses keys that it does not know, and null.

    The only type with vision whose processor leaves pixels and number of tokens to us is ``videochat_flash_qwen``.
    """
    config, tokenizer = description.config, description.tokenizer
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    vision = description.images is not None
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": description.graphs["decoder"],
        "head_size": int(head_size),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "inputs_embeds" if vision else "input_ids": "inputs_embeds" if vision else "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    bos = {} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id}
    model = {
        "type": "videochat_flash_qwen" if vision else "decoder",
        "context_length": description.context_length,
        "vocab_size": config.vocab_size,
        **bos,
        "eos_token_id": list(description.stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "decoder": decoder,
        **(_genai_vision(description) if vision else {}),
    }
    search = {
        "do_sample": False,
        "max_length": min(description.context_length, MAX_LENGTH),
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def _genai_vision(description: FolderDescription) -> dict[str, Any]:
    return {
        "vision": {
            "filename": description.graphs["vision"],
            "config_filename": OGA_PROCESSOR,
            "num_visual_tokens": description.visual_tokens,
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": description.graphs["embedding"],
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
    }


def tokenizer_file(description: FolderDescription) -> dict[str, Any]:
    """Return ``tokenizer.json``: the tokenizer's own, with the image placeholder for a model with vision.

    The placeholder is the first id without a row in the head. Tokenizers count on from their last id whatever the file
    says, so ids between the two are named too. With vision the BOS that a post-processor would put in front is left
    out: the template writes it, and transformers.js' processor for images would add a second one. ``add_bos_token`` in
    ``tokenizer_config.json`` still says that the model wants it.
    """
    content: dict[str, Any] = json.loads(_backend(description.tokenizer).to_str())
    content["padding"] = content["truncation"] = None
    if description.images is not None:
        highest = max(int(id) for id in description.tokenizer.get_vocab().values())
        fillers = range(highest + 1, description.placeholder_id)
        content["added_tokens"] += [_added(f"<|lavintk_unused_{id}|>", id) for id in fillers]
        content["added_tokens"].append(_added(PLACEHOLDER, description.placeholder_id))
        if _adds_bos(description.tokenizer):
            content["post_processor"] = None
    return content


def tokenizer_config(description: FolderDescription) -> dict[str, Any]:
    """Return ``tokenizer_config.json``.

    The class is the plain one, for which all three programs follow ``tokenizer.json``; others bring ways of their own
    that the model was not trained with. transformers.js finds the chat template only here. ``add_bos_token`` is what
    lavintk's runtime goes by.
    """
    tokenizer, vision = description.tokenizer, description.images is not None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name) is not None}
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": description.context_length,
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "add_bos_token": _adds_bos(tokenizer),
        "add_eos_token": False,
        **special,
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in tokenizer_file(description)["added_tokens"]
        },
        "chat_template": exported_template(
            tokenizer, description.template, description.system, PLACEHOLDER if vision else None
        ),
    }
    if vision:
        content["extra_special_tokens"] = {"image_token": PLACEHOLDER}
    return content


def tokenizer_module(description: FolderDescription) -> dict[str, Any]:
    """Return ``tokenizer_module.json``, which onnxruntime-genai's tokenizer alone reads.

    Its processor writes an image as start, K pads and end, which would be two tokens more than the model was trained
    with. Here start and first pad, and last pad and end, are one token each, with the placeholder's id; the longest
    match wins.
    """
    texts = (PLACEHOLDER, VISION_START + IMAGE_PAD, IMAGE_PAD, IMAGE_PAD + VISION_END)
    return {"added_tokens": [_added(text, description.placeholder_id) for text in texts]}


def _added(text: str, id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": True}


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, which other programs need. "
            "Put the one that came with the weights beside them."
        )
    return backend


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids[:1] == [tokenizer.bos_token_id])


def preprocessor_config(images: ImageProcessor) -> dict[str, Any]:
    """Return ``preprocessor_config.json``, read by transformers.js and transformers as CLIP's.

    transformers.js looks here, not into ``processor_config.json``, for the class of the processor. In Node it resizes
    without smoothing unless asked for Lanczos: photographs of 600 pixels brought to 224 are then 0.8 to 1.1 of 255
    levels away from Pillow's bicubic on average, against 5 to 10 with bicubic by its name. Browsers resize in their own
    way whatever stands here, 2.5 to 6 levels away. Images that have the right size come out equal everywhere.
    """
    crop = images.resize == "crop"
    size = {"height": images.height, "width": images.width}
    edge = images.shortest_edge or min(images.height, images.width)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edge} if crop else size,
        "resample": images.resample if images.resample == _NEAREST else _LANCZOS,
        "do_center_crop": crop,
        **({"crop_size": size} if crop else {}),
        "do_rescale": True,
        "rescale_factor": images.rescale,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }


def processor_config(description: FolderDescription) -> dict[str, Any]:
    """Return ``processor_config.json``, read by transformers.js and transformers as LLaVA's.

    An image counts (height // patch_size) * (width // patch_size) + num_additional_image_tokens placeholders: patches
    larger than the image leave the additional ones, which are any number.
    """
    assert description.images is not None
    return {
        "processor_class": "LlavaProcessor",
        "image_token": PLACEHOLDER,
        "patch_size": 1 + max(description.images.height, description.images.width),
        "num_additional_image_tokens": description.visual_tokens,
        "vision_feature_select_strategy": "full",
    }


def oga_processor(images: ImageProcessor) -> dict[str, Any]:
    """Return onnxruntime-genai's steps from an image file to pixels: Pillow's own arithmetic.

    Version 0.18 ignores ``keep_aspect_ratio``, so where the recipe crops (``data.resize``), it squashes images that are
    not square, and nothing written here can change that.
    """
    size = {"height": images.height, "width": images.width}
    crop = images.resize == "crop"
    edge = images.shortest_edge or min(images.height, images.width)
    target = {"height": edge, "width": edge} if crop else size
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", {**target, "keep_aspect_ratio": int(crop), "interpolation": _OGA_FILTERS[images.resample]}),
        *([("CenterCrop", size)] if crop else []),
        ("Rescale", {"rescale_factor": float(images.rescale)}),
        ("Normalize", {"mean": list(images.mean), "std": list(images.std)}),
        ("Permute3D", {"dims": [2, 0, 1]}),
    ]
    transforms = [{"operation": {"name": name.lower(), "type": name, "attrs": attrs}} for name, attrs in steps]
    return {"processor": {"name": "lavintk_image_processing", "transforms": transforms}}
