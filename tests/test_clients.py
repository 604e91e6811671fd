"""Exported folders in the programs of others: onnxruntime-genai, transformers, transformers.js in Node and Chromium."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from jinja2 import Environment
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from lavintk.data.images import ImageProcessor
from lavintk.data.records import Message, Record
from lavintk.data.template import Template, make_template
from lavintk.errors import ModelError
from lavintk.models.tokenizer import load_tokenizer
from lavintk_onnx.folder import PLACEHOLDER, FolderDescription, model_config
from lavintk_onnx.templates import text_prompt_is_exact, without_block_lines
from tests.tiny import write_tokenizer
from tests.tiny_graphs import PATCH, SIZE, greedy, write_client_folder, write_sentencepiece_like_tokenizer

Chat = list[dict[str, Any]]
CLIENTS = Path(__file__).parent / "clients"
INSTALL = "see tests/clients/README.md for the command that installs it"
QUESTION = 'what color is the "shape"?\nSay it: 漢 é.'
SYSTEM = 'Be "brief".\nAlways {{ x }} \\ %}'
COUNT = 8
LINES = """{# how it looks #}
{%- set end = 'tail' %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
[{{ message['content'] }}]

    {% else %}
<|start|>{{ message['role'] }}
{{ message['content'] | trim }}<|end|>
    {% endif %}
{% endfor %}

{{ end }}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}
"""
"""A template that relies on transformers' way with line breaks."""
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@dataclass(frozen=True)
class Exported:
    """A folder, what it was written from, and the template of training."""

    folder: Path
    description: FolderDescription
    template: Template

    def trained_ids(self, turns: Chat, picture: Path | None = None) -> list[int]:
        """Return the prompt's ids as in training, the placeholder's id in visual slots."""
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        row = self.template.prompt(Record("r", messages, (picture,) if picture else ()))
        slots = set(row.visual_slots)
        return [self.description.placeholder_id if i in slots else id for i, id in enumerate(row.input_ids)]

    def graph(self, role: str) -> Path:
        return self.folder / self.description.graphs[role]

    def run(self, role: str, **inputs: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = onnxruntime.InferenceSession(self.graph(role)).run(None, inputs)[0]
        return found

    def expected(self, ids: list[int], picture: Path | None = None) -> list[int]:
        """Return greedy tokens of plain onnxruntime, up to and without the first that ends an answer."""
        rows = np.array([ids], np.int64)
        if self.description.images is None:
            tokens = greedy(self.graph("decoder"), rows[0], COUNT)
        else:
            features = np.zeros((0, 64), np.float32)
            if picture:
                features = self.run("vision", pixel_values=self.description.images(picture)[None].numpy())
            first = self.run("embedding", input_ids=rows, image_features=features)[0]
            tokens = greedy(self.graph("decoder"), first, COUNT, self.graph("embed_tokens"))
        return until_stop(tokens, self.description.stop_ids)


def until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in stop), len(tokens))]


def export(folder: Path, tokenizer: Any, kind: str, *, vision: bool, system: str | None = None, **how: Any) -> Exported:
    half = (0.5, 0.5, 0.5)
    images = ImageProcessor(SIZE, SIZE, half, half) if vision else None
    template = make_template(tokenizer, kind, system, visual_tokens=(SIZE // PATCH) ** 2 if vision else 0)
    return Exported(folder, write_client_folder(folder, tokenizer, template, images=images, **how), template)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_sentencepiece_like_tokenizer(tmp_path_factory.mktemp("spaced")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, byte_level: Any) -> Exported:
    return export(tmp_path_factory.mktemp("text"), byte_level, "chat", vision=False)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory, spaced: Any) -> Exported:
    """A model with vision, with the template and the BOS of LaVIN's LLaMA."""
    return export(tmp_path_factory.mktemp("vision"), spaced, "lavin", vision=True, system="Be brief.")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("picture") / "picture.png", SIZE, SIZE)


def noise(path: Path, height: int, width: int) -> Path:
    """Write an image of smooth random colours."""
    small = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def genai() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the module is loaded
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed; it is in the extra dev")


@pytest.fixture(scope="module")
def node() -> Callable[..., Any]:
    """Return a function that runs a script of tests/clients and returns the JSON that it prints."""
    program = shutil.which("node")
    if program is None:
        pytest.skip(f"node is not installed; {INSTALL}")
    if not (CLIENTS / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"transformers.js is not installed; {INSTALL}")

    def run(script: str, *arguments: object) -> Any:
        given = [argument if isinstance(argument, (str, Path)) else json.dumps(argument) for argument in arguments]
        done = subprocess.run([program, script, *given], cwd=CLIENTS, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def browser(node: Callable[..., Any]) -> Callable[..., Any]:
    if not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists():
        pytest.skip(f"Chromium is not installed; {INSTALL}")
    return lambda *arguments: node("browser.mjs", *arguments)


def asked(picture: bool = False, text: str = QUESTION) -> Chat:
    image: Chat = [{"type": "image"}] if picture else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}] if picture else text}]


def genai_answer(genai: Any, exported: Exported, chat: Chat, picture: Path | None) -> tuple[list[int], list[int]]:
    """Return the ids of prompt and answer."""
    model = genai.Model(str(exported.folder))
    tokenizer = genai.Tokenizer(model)
    prompt = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
    parameters = genai.GeneratorParams(model)
    if picture is None:
        inputs, ids = None, [int(id) for id in tokenizer.encode(prompt)]
    else:
        inputs = model.create_multimodal_processor()(prompt, images=genai.Images.open(str(picture)))
        ids = [int(id) for id in inputs["input_ids"].as_numpy()[0]]
    parameters.set_search_options(max_length=len(ids) + COUNT, do_sample=False)
    generator = genai.Generator(model, parameters)
    if inputs is None:
        generator.append_tokens(ids)
    else:
        generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    return ids, [int(id) for id in generator.get_sequence(0)][len(ids) :]


def test_onnxruntime_genai_answers_text_as_plain_onnxruntime_does(genai: Any, text: Exported, vision: Exported) -> None:
    for exported in (text, vision):
        ids, answer = genai_answer(genai, exported, asked(), None)
        assert ids == exported.trained_ids(asked())
        assert answer == exported.expected(ids)


def test_onnxruntime_genai_answers_about_an_image_file_as_plain_onnxruntime_does(
    genai: Any, vision: Exported, picture: Path
) -> None:
    ids, answer = genai_answer(genai, vision, asked(picture=True), picture)
    assert ids == vision.trained_ids(asked(), picture)
    assert answer == vision.expected(ids, picture)


def test_transformers_js_answers_text_as_plain_onnxruntime_does(node: Callable[..., Any], text: Exported) -> None:
    found = node("text.mjs", text.folder, asked(), COUNT)
    assert found["input_ids"] == text.trained_ids(asked())
    assert until_stop(found["generated_ids"], text.description.stop_ids) == text.expected(found["input_ids"])


def test_transformers_js_answers_about_an_image_as_plain_onnxruntime_does(
    node: Callable[..., Any], vision: Exported, picture: Path
) -> None:
    found = node("image.mjs", vision.folder, picture, asked(picture=True), COUNT)
    assert found["input_ids"] == vision.trained_ids(asked(), picture)
    assert until_stop(found["generated_ids"], vision.description.stop_ids) == vision.expected(
        found["input_ids"], picture
    )


def test_a_browser_answers_text_as_plain_onnxruntime_does(browser: Callable[..., Any], text: Exported) -> None:
    (found,) = browser(text.folder, [{"messages": asked(), "count": COUNT}])
    assert found["input_ids"] == text.trained_ids(asked())
    assert until_stop(found["generated_ids"], text.description.stop_ids) == text.expected(found["input_ids"])


def test_a_browser_answers_about_an_image_and_text_as_plain_onnxruntime_does(
    browser: Callable[..., Any], vision: Exported, picture: Path
) -> None:
    tasks = [
        {"messages": asked(), "count": COUNT},
        {"messages": asked(picture=True), "count": COUNT, "image": True},
    ]
    for found, shown in zip(browser(vision.folder, tasks, picture), (None, picture), strict=True):
        assert found["input_ids"] == vision.trained_ids(asked(), shown)
        answer = until_stop(found["generated_ids"], vision.description.stop_ids)
        assert answer == vision.expected(found["input_ids"], shown)


CONVERSATIONS: list[Chat] = [
    asked(),
    [{"role": "system", "content": "other"}, *asked()],
    [*asked(), {"role": "assistant", "content": "red"}, *asked(text="sure?")],
    asked(text=" lead "),
]


def in_parts(chat: Chat, image: bool) -> Chat:
    """Return the conversation with contents in parts, an image in front of the first question."""
    first = next(place for place, turn in enumerate(chat) if turn["role"] == "user")
    shown = [[{"type": "image"}] if image and place == first else [] for place in range(len(chat))]
    parts = [[*image, {"type": "text", "text": turn["content"]}] for image, turn in zip(shown, chat, strict=True)]
    return [{"role": turn["role"], "content": part} for turn, part in zip(chat, parts, strict=True)]


@dataclass(frozen=True)
class Prompts:
    """Conversations for a folder, and their ids in training."""

    exported: Exported
    chats: list[Chat]
    trained: list[list[int]]

    @classmethod
    def of(cls, exported: Exported, picture: Path) -> "Prompts":
        chats = CONVERSATIONS + [in_parts(chat, image=False) for chat in CONVERSATIONS]
        trained = [exported.trained_ids(chat) for chat in CONVERSATIONS] * 2
        if exported.description.images is not None:
            chats = chats + [in_parts(chat, image=True) for chat in CONVERSATIONS]
            trained = trained + [single(exported, chat, picture) for chat in CONVERSATIONS]
        return cls(exported, chats, trained)


def single(exported: Exported, chat: Chat, picture: Path) -> list[int]:
    """Return the ids of training with one placeholder for the image, as a template writes it."""
    ids, placeholder = exported.trained_ids(chat, picture), exported.description.placeholder_id
    return [id for place, id in enumerate(ids) if id != placeholder or ids[place - 1] != placeholder]


@pytest.fixture(scope="module")
def prompts(
    tmp_path_factory: pytest.TempPathFactory, byte_level: Any, spaced: Any, picture: Path
) -> dict[str, Prompts]:
    """Folders of all kinds of templates."""
    root = tmp_path_factory.mktemp("prompts")
    files = {"lines": LINES, "bos": WITH_BOS}
    for name, content in files.items():
        (root / f"{name}.jinja").write_text(content, encoding="utf-8")
    kinds = {
        "chat": (byte_level, "chat"),
        "plain": (byte_level, "plain"),
        "lines": (byte_level, str(root / "lines.jinja")),
        "bos": (spaced, str(root / "bos.jinja")),
        "lavin": (spaced, "lavin"),
        "spaced": (spaced, "plain"),
    }
    found = {}
    for name, (tokenizer, kind) in kinds.items():
        for seeing in (False, True):
            folder = root / f"{name}-{seeing}"
            system = SYSTEM if seeing else None
            exported = export(folder, tokenizer, kind, vision=seeing, system=system)
            found[folder.name] = Prompts.of(exported, picture)
    wide = export(root / "wide", byte_level, "chat", vision=True, system=SYSTEM, vocabulary=len(byte_level) + 5)
    return {**found, "wide": Prompts.of(wide, picture)}


def test_transformers_gives_the_ids_of_training_with_the_exported_template(prompts: dict[str, Prompts]) -> None:
    for name, given in prompts.items():
        tokenizer = AutoTokenizer.from_pretrained(given.exported.folder)
        for chat, trained in zip(given.chats, given.trained, strict=True):
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
            assert ids == trained, (name, chat)


def test_onnxruntime_genai_gives_the_ids_of_training_with_the_exported_template(
    genai: Any, prompts: dict[str, Prompts]
) -> None:
    for name, given in prompts.items():
        tokenizer = genai.Tokenizer(genai.Model(str(given.exported.folder)))
        for chat, trained in zip(given.chats, given.trained, strict=True):
            text = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
            assert [int(id) for id in tokenizer.encode(text)] == trained, (name, chat)


def test_transformers_js_gives_the_ids_of_training_with_the_exported_template(
    node: Callable[..., Any], prompts: dict[str, Prompts]
) -> None:
    tasks = [{"folder": str(given.exported.folder), "conversations": given.chats} for given in prompts.values()]
    for (name, given), rows in zip(prompts.items(), node("prompts.mjs", tasks), strict=True):
        for chat, trained, ids in zip(given.chats, given.trained, rows, strict=True):
            assert ids == trained, (name, chat)


def test_the_placeholder_has_no_row_in_the_head_and_is_the_next_id_of_the_tokenizer(
    prompts: dict[str, Prompts],
) -> None:
    for name in ("chat-True", "wide"):
        exported = prompts[name].exported
        tokenizer = AutoTokenizer.from_pretrained(exported.folder)
        assert tokenizer.convert_tokens_to_ids(PLACEHOLDER) == exported.description.config.vocab_size
        assert len(tokenizer) == exported.description.config.vocab_size + 1


def test_a_text_model_refuses_images_in_the_template(text: Exported) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text.folder)
    with pytest.raises(Exception, match="takes no images"):
        tokenizer.apply_chat_template(asked(picture=True), tokenize=False)


def test_lavins_form_without_an_image_is_exact_only_where_a_space_keeps_texts_apart(
    byte_level: Any, spaced: Any
) -> None:
    assert text_prompt_is_exact(spaced, "lavin", "Be brief.")
    assert text_prompt_is_exact(byte_level, "plain", "yes")
    tokenizer = load_tokenizer_with_words(byte_level)
    assert not text_prompt_is_exact(tokenizer, "lavin")


def load_tokenizer_with_words(byte_level: Any) -> Any:
    """Return a byte-level tokenizer in which ``AInstruction`` is cut otherwise than ``A`` and ``Instruction``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(byte_level.backend_tokenizer.to_str())
    content["model"]["vocab"]["AI"] = len(content["model"]["vocab"])
    content["model"]["merges"].insert(0, ["A", "I"])
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="</s>")


@pytest.mark.parametrize(
    "template", [LINES, "\n  {% if x %}\n\n\n a {% endif %} b\n", "{# c #}\n\n{{ x }}\n\n", " a\n"]
)
def test_a_template_without_block_lines_reads_the_same_in_both_settings(template: str) -> None:
    settings = {"trim_blocks": True, "lstrip_blocks": True}
    values = {"messages": asked(), "add_generation_prompt": True, "x": 1}
    expected = Environment(**settings).from_string(template).render(values)  # type: ignore[arg-type]
    for environment in (Environment(), Environment(**settings)):  # type: ignore[arg-type]
        assert environment.from_string(without_block_lines(template)).render(values) == expected


def test_onnxruntime_genai_resizes_images_as_training_does(genai: Any, vision: Exported, tmp_path: Path) -> None:
    wide = noise(tmp_path / "wide.png", 50, 90)
    processor = genai.Model(str(vision.folder)).create_multimodal_processor()
    pixels = processor(PLACEHOLDER, images=genai.Images.open(str(wide)))["pixel_values"].as_numpy()
    assert vision.description.images is not None
    np.testing.assert_allclose(pixels[0, 0], vision.description.images(wide).numpy(), atol=1e-6)


def test_transformers_js_resizes_images_nearly_as_training_does(
    node: Callable[..., Any], vision: Exported, tmp_path: Path
) -> None:
    wide = noise(tmp_path / "wide.png", 50, 90)
    found = node("image.mjs", vision.folder, wide)
    assert vision.description.images is not None
    trained = vision.description.images(wide).numpy()
    levels = np.abs(np.reshape(found["pixel_values"], found["pixel_dims"])[0] - trained) * 0.5 * 255
    assert levels.mean() < 1.5


def test_transformers_reads_the_configuration_of_a_model_with_vision(vision: Exported) -> None:
    config = AutoConfig.from_pretrained(vision.folder)
    assert config.model_type == "llava"
    assert config.image_token_index == vision.description.placeholder_id
    assert config.text_config.vocab_size == vision.description.config.vocab_size


def test_no_file_names_the_place_where_the_model_came_from(text: Exported, byte_level: Any) -> None:
    for path in text.folder.glob("*.json*"):
        assert str(byte_level.name_or_path) not in path.read_text(encoding="utf-8")


def test_a_graph_that_transformers_js_would_not_find_is_refused(vision: Exported) -> None:
    graphs = {**vision.description.graphs, "vision": "onnx/vision_encoder_int3.onnx"}
    description = FolderDescription(**{**vision.description.__dict__, "graphs": graphs})
    with pytest.raises(ModelError, match=r"would not find onnx/vision_encoder_int3\.onnx"):
        model_config(description)


def test_graphs_of_different_precision_are_named_one_by_one(vision: Exported) -> None:
    graphs = {**vision.description.graphs, "vision": "onnx/vision_encoder_fp16.onnx"}
    hints = model_config(FolderDescription(**{**vision.description.__dict__, "graphs": graphs}))[
        "transformers.js_config"
    ]
    assert hints["dtype"] == {"decoder_model_merged": "q4", "vision_encoder": "fp16", "embed_tokens": "q4"}
    assert hints["use_external_data_format"] == {"decoder_model_merged_q4.onnx": 1}
