"""Other trainers' models on any weights, without a checkpoint on disk: transformers + PEFT + bitsandbytes, Unsloth.

Weights come from a function that reads one tensor by its name in transformers' causal LM, so that 4-bit layers are
filled one at a time and the 16-bit model never exists. Settings are those of the peers' own QLoRA guides.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Read = Callable[[str], "torch.Tensor"]
RANK, ALPHA = 16, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACK = "model.layers."
"""How the names of the layers that are quantized begin; the head is not, as transformers does by default."""


def hf_model(config: PretrainedConfig, read: Read, *, quant: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return transformers' causal LM on ``device``, its decoder's linear layers in bitsandbytes' storage.

    :param read: returns a tensor by its name, in any type and on any device; it is quantized as it comes.
    :param quant: ``"nf4"`` (with double quantization) or ``"none"``.
    :param dtype: of the weights that are not quantized, and of the products.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation, config.use_cache = "sdpa", False
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in [name for name, _ in model.named_parameters()]:
        path, _, leaf = name.rpartition(".")
        module, value = model.get_submodule(path), read(name).to(device)
        if quant == "nf4" and name.startswith(STACK) and isinstance(module, torch.nn.Linear):
            parent, _, place = path.rpartition(".")
            setattr(model.get_submodule(parent), place, four_bit_linear(value, dtype))
        else:
            setattr(module, leaf, torch.nn.Parameter(value.to(dtype), requires_grad=False))
        del value
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # its frequencies are a buffer that no checkpoint holds
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.is_loaded_in_4bit = quant == "nf4"  # what PEFT asks before it wraps a layer
    return model


def four_bit_linear(weight: torch.Tensor, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' NF4 layer with double quantization of ``weight`` ``[out, in]``."""
    from bitsandbytes import nn

    bnb: Any = nn  # untyped
    rows, columns = weight.shape
    layer = bnb.Linear4bit(
        columns, rows, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    parameter = bnb.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.weight = parameter.to(weight.device)  # moving it quantizes it, also to where it is already
    return layer


def with_lora(model: Any, *, checkpointing: bool) -> Any:
    """Return PEFT's model with LoRA on all seven linear layers, prepared as PEFT's guide says for k-bit training."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    prepare: Any = prepare_model_for_kbit_training  # untyped
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def unsloth_model(geometry: str, length: int, *, checkpointing: bool) -> tuple[Any, float]:
    """Return Unsloth's model with LoRA, and the seconds that loading took.

    Unsloth only loads from a folder. It gets one in NF4 already, 4 GB for 7b, so it is spared the quantization.

    :param length: most tokens of a row.
    """
    with TemporaryDirectory() as folder:
        # in a process of its own: Unsloth must be imported before transformers, and the device be empty
        maker = multiprocessing.get_context("spawn").Process(target=write_four_bit, args=(geometry, folder))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"the checkpoint for Unsloth could not be written (exit code {maker.exitcode})")
        import torch
        from unsloth import FastLanguageModel  # type: ignore[import-not-found]

        begun = time.perf_counter()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        lora = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=LINEARS,
            use_gradient_checkpointing="unsloth" if checkpointing else False, random_state=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        return lora.train(), time.perf_counter() - begun


def write_four_bit(geometry: str, folder: str, device_name: str = "cuda") -> None:
    """Write a checkpoint of random weights in bitsandbytes' NF4 that ``from_pretrained`` loads, and a toy tokenizer."""
    import torch
    from geometries import LANGUAGE, RandomSource
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    device = torch.device(device_name)
    config = copy.deepcopy(LANGUAGE[geometry])
    source = RandomSource(config, device)
    model = hf_model(config, source.read, quant="nf4", device=device, dtype=torch.bfloat16)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    settings["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()  # fmt: skip
    (Path(folder) / "config.json").write_text(json.dumps(settings))
    write_tokenizer(Path(folder), int(config.vocab_size))


def write_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer of ``words`` made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(words - 3))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
