"""Exported folders in the programs of others: onnxruntime, onnxruntime-genai, transformers, transformers.js.

All prompts and greedy answers are those of lavintk's own runtime, whose logits other tests compare with the model's.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from jinja2 import Environment
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import lavintk
from lavintk.data.records import Message, Record
from lavintk.errors import ModelError
from lavintk.export import export_run
from lavintk.models.tokenizer import load_tokenizer
from lavintk.registry import Choice
from lavintk.run import Run
from lavintk.runtime import ExportedModel, load
from lavintk.runtime.manifest import Manifest
from lavintk.runtime.sessions import Opener
from lavintk.testing.runs import COLOURS, multimodal, recipe, write_everything
from lavintk.testing.tiny import VOCABULARY, write_language_model
from lavintk_onnx.folder import PLACEHOLDER, FolderDescription, model_config
from lavintk_onnx.templates import text_prompt_is_exact, without_block_lines

Chat = list[dict[str, Any]]
Array = NDArray[Any]
CLIENTS = Path(__file__).parent / "clients"
INSTALL = "see tests/clients/README.md for the command that installs it"
QUESTION = 'what color is the "shape"?\nSay it: 漢 é.'
SYSTEM = 'Be "brief".\nAlways {{ x }} \\ %}'
COUNT = 16
MARGIN = 0.5
"""Least lead of the best token: more than what kernels of other builds and processors make of 8-bit activations."""
GRIDS: dict[str, dict[str, Any]] = {
    "fp32": {"quant": "fp32"},
    "int4": {"quant": "int4"},
    "int4 for browsers": {"quant": "int4", "embed_quant": "fp16"},
}
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
    """A folder and the trained run that it was exported from."""

    folder: Path
    run: Run

    @classmethod
    def of(cls, run: Run, out: Path, **options: Any) -> "Exported":
        export_run(Run.open(run.folder), Choice("onnx", options), out, verify=False)
        return cls(out, run)

    @property
    def placeholder(self) -> int:
        return int(self.run.assembly.model.language.config.vocab_size)

    @property
    def images(self) -> Any:
        return self.run.assembly.images

    @property
    def stop(self) -> tuple[int, ...]:
        return self.run.assembly.template.stop_ids

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def trained_ids(self, turns: Chat, picture: Path | None = None) -> list[int]:
        """Return the prompt's ids as in training, the placeholder's id in visual slots."""
        row = self.run.assembly.template.prompt(as_record(turns, picture))
        slots = set(row.visual_slots)
        return [self.placeholder if i in slots else id for i, id in enumerate(row.input_ids)]


def as_record(turns: Chat, picture: Path | None) -> Record:
    return Record("r", tuple(Message(turn["role"], turn["content"]) for turn in turns), (picture,) if picture else ())


@dataclass(frozen=True)
class Case:
    """A question to a folder."""

    name: str
    exported: Exported
    question: str
    colour: str
    picture: Path | None = None

    @property
    def chat(self) -> Chat:
        return asked(self.picture is not None, self.question)

    @property
    def record(self) -> Record:
        return as_record(asked(text=self.question), self.picture)

    @property
    def trained_ids(self) -> list[int]:
        return self.exported.trained_ids(asked(text=self.question), self.picture)

    def own_answer(self) -> list[int]:
        """Return the greedy ids of lavintk's runtime with the one decoder that other clients know, that for images."""
        manifest = Manifest.read(self.exported.folder)
        decoder = manifest.decoders.get("all") or manifest.decoders["image"]
        model = ExportedModel(replace(manifest, decoders={"all": decoder}), Opener(threads=1))
        (ids,) = model.answer_ids([self.record], max_new_tokens=COUNT)
        row = model.template.prompt(self.record)
        whole = replace(row, input_ids=row.input_ids + ids, labels=row.labels + ids)
        best = np.sort(model.row_logits([whole])[0][len(row) - 1 : -1], axis=-1)[:, -2:]
        assert np.diff(best).min() > MARGIN, f"{self.name}: rounding decides what is answered"
        return ids

    def task(self) -> dict[str, Any]:
        """Return what tests/clients/common.mjs calls a task."""
        image = {"image": str(self.picture)} if self.picture else {}
        return {"folder": str(self.exported.folder), "messages": self.chat, "count": COUNT, **image}

    def check(self, prompt: list[int], answer: list[int]) -> None:
        """Compare ids with ours; some clients leave the one out that ends an answer."""
        own = self.own_answer()
        assert prompt == self.trained_ids, self.name
        assert answer in (own, own[:-1] if own[-1] in self.exported.stop else own), self.name


def said(colour: str) -> str:
    """Return an answer of several tokens."""
    return f"it is {colour}, {colour}"


def train(base: Path, out: Path, language: str, *, seeing: bool, steps: int = 1, **data: Any) -> Run:
    """Train a tiny run: LoRA on texts, or LaVIN's adapters on texts and pictures.

    :param language: which of the language models of :func:`base`.
    """
    adapter = {"name": "mma", "dim": 16, "placement": "block"} if seeing else {"name": "lora", "r": 16}
    content = (multimodal if seeing else recipe)(base, max_steps=steps, batch_size=8, lr=0.03 if seeing else 0.01)
    content["model"]["language"] = str(base / language)
    content["data"] |= data
    return lavintk.train({**content, "adapter": adapter, "quant": "int4" if steps > 1 else "none"}, out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a vision tower and language models whose tokenizers are of two kinds."""
    folder = write_everything(tmp_path_factory.mktemp("base"))
    write_language_model(folder / "spaced")
    write_sentencepiece_like_tokenizer(folder / "spaced")
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    longer = [{**row, "answer": said(row["answer"])} for row in rows]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, longer)))
    texts = [{"instruction": f"what color is {name}?", "input": "", "output": said(name)} for name in COLOURS]
    (folder / "alpaca.json").write_text(json.dumps(texts))
    return folder


@pytest.fixture(scope="module")
def byte_level(base: Path) -> Any:
    return load_tokenizer(base / "llm")


@pytest.fixture(scope="module")
def spaced(base: Path) -> Any:
    return load_tokenizer(base / "spaced")


@pytest.fixture(scope="module")
def text(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """A text model with LoRA on each grid."""
    root = tmp_path_factory.mktemp("text")
    run = train(base, root / "run", "llm", seeing=False, steps=50, template="chat")
    return {grid: Exported.of(run, root / grid, **options) for grid, options in GRIDS.items()}


@pytest.fixture(scope="module")
def vision(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """A model with vision and LaVIN's adapters on each grid, with the template and the BOS of LaVIN's LLaMA."""
    root = tmp_path_factory.mktemp("vision")
    run = train(base, root / "run", "spaced", seeing=True, steps=80, template="lavin", system="Be brief.")
    return {grid: Exported.of(run, root / grid, **options) for grid, options in GRIDS.items()}


@pytest.fixture(scope="module")
def cases(text: dict[str, Exported], vision: dict[str, Exported], base: Path) -> list[Case]:
    """Questions of the training to both models on all grids."""
    shape = "what color is the shape?"
    return [
        *(Case(f"text, {grid}", exported, "what color is black?", "black") for grid, exported in text.items()),
        *(Case(f"vision without image, {grid}", exported, shape, "red") for grid, exported in vision.items()),
        *(Case(f"vision, {grid}", exported, shape, "green", base / "2.png") for grid, exported in vision.items()),
    ]


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
def script() -> Callable[..., Any]:
    """Return a function that does tasks by a script of tests/clients and returns the results."""
    program = shutil.which("node")
    if program is None:
        pytest.skip(f"node is not installed; {INSTALL}")
    if not (CLIENTS / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"transformers.js is not installed; {INSTALL}")

    def run(name: str, tasks: list[dict[str, Any]]) -> Any:
        command = [program, name, json.dumps(tasks)]
        done = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def node(script: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tasks: script("node.mjs", tasks)


@pytest.fixture(scope="module")
def browser(script: Callable[..., Any]) -> Callable[..., Any]:
    if not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists():
        pytest.skip(f"Chromium is not installed; {INSTALL}")
    if not (CLIENTS / "node_modules" / "playwright-core").is_dir():
        pytest.skip(f"playwright-core is not installed; {INSTALL}")
    return lambda tasks: script("browser.mjs", tasks)


def asked(picture: bool = False, text: str = QUESTION) -> Chat:
    image: Chat = [{"type": "image"}] if picture else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}] if picture else text}]


def test_our_runtime_says_what_was_trained_of_texts_and_pictures(cases: list[Case]) -> None:
    """Else answers might agree whatever a client makes of its prompt."""
    for case in cases:
        said_by_model = load(case.exported.folder, threads=1).answer([case.record], max_new_tokens=COUNT)
        assert said_by_model == [said(case.colour)], case.name


def onnxruntime_answer(case: Case) -> list[int]:
    """Return the greedy ids of plain onnxruntime, the whole sequence computed anew for each."""
    model = case.exported.json("genai_config.json")["model"]
    graphs = {"decoder": model["decoder"], **{role: model[role] for role in ("vision", "embedding") if role in model}}
    sessions = {
        role: onnxruntime.InferenceSession(case.exported.folder / graph["filename"]) for role, graph in graphs.items()
    }
    empty = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in sessions["decoder"].get_inputs()
        if entry.name.startswith("past_key_values")
    }
    features = np.zeros((0, model["decoder"]["hidden_size"]), np.float32)
    if case.picture:
        pixels = case.exported.images(case.picture)[None].numpy()
        features = sessions["vision"].run(None, {"pixel_values": pixels})[0]
    answer = list[int]()
    for _ in range(COUNT):
        ids = [*case.trained_ids, *answer]
        given: dict[str, Array] = {"input_ids": np.array([ids])}
        if "embedding" in sessions:
            (embeds,) = sessions["embedding"].run(None, {**given, "image_features": features})
            given = {"inputs_embeds": embeds}
        mask = np.ones((1, len(ids)), np.int64)
        logits = sessions["decoder"].run(["logits"], {**given, "attention_mask": mask, **empty})[0]
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] in case.exported.stop:
            break
    return answer


def test_onnxruntime_answers_as_our_runtime_does(cases: list[Case]) -> None:
    for case in cases:
        case.check(case.trained_ids, onnxruntime_answer(case))


def genai_answer(genai: Any, case: Case) -> tuple[list[int], list[int]]:
    """Return the ids of prompt and answer."""
    model = genai.Model(str(case.exported.folder))
    tokenizer = genai.Tokenizer(model)
    prompt = tokenizer.apply_chat_template(json.dumps(case.chat), add_generation_prompt=True)
    parameters = genai.GeneratorParams(model)
    if case.picture is None:
        inputs, ids = None, [int(id) for id in tokenizer.encode(prompt)]
    else:
        inputs = model.create_multimodal_processor()(prompt, images=genai.Images.open(str(case.picture)))
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


def test_onnxruntime_genai_answers_as_our_runtime_does(genai: Any, cases: list[Case]) -> None:
    for case in cases:
        case.check(*genai_answer(genai, case))


def test_transformers_js_answers_as_our_runtime_does(node: Callable[..., Any], cases: list[Case]) -> None:
    for case, found in zip(cases, node([case.task() for case in cases]), strict=True):
        case.check(found["input_ids"], found["generated_ids"])


def test_a_browser_answers_as_our_runtime_does(browser: Callable[..., Any], cases: list[Case]) -> None:
    """WebAssembly lacks the operator that gathers from 8-bit embeddings."""
    fit = [case for case in cases if not case.name.endswith("int4")]
    for case, found in zip(fit, browser([case.task() for case in fit]), strict=True):
        case.check(found["input_ids"], found["generated_ids"])


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
        if exported.images is not None:
            chats = chats + [in_parts(chat, image=True) for chat in CONVERSATIONS]
            trained = trained + [single(exported, chat, picture) for chat in CONVERSATIONS]
        return cls(exported, chats, trained)


def single(exported: Exported, chat: Chat, picture: Path) -> list[int]:
    """Return the ids of training with one placeholder for the image, as a template writes it."""
    ids, placeholder = exported.trained_ids(chat, picture), exported.placeholder
    return [id for place, id in enumerate(ids) if id != placeholder or ids[place - 1] != placeholder]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Prompts]:
    """Folders of all kinds of templates."""
    root = tmp_path_factory.mktemp("prompts")
    files = {"lines": LINES, "bos": WITH_BOS}
    for name, content in files.items():
        (root / f"{name}.jinja").write_text(content, encoding="utf-8")
    kinds = {
        "chat": ("llm", "chat"),
        "plain": ("llm", "plain"),
        "lines": ("llm", str(root / "lines.jinja")),
        "bos": ("spaced", str(root / "bos.jinja")),
        "lavin": ("spaced", "lavin"),
        "spaced": ("spaced", "plain"),
    }
    found = {}
    for name, (language, kind) in kinds.items():
        for seeing in (False, True):
            out = root / f"{name}-{seeing}"
            system = SYSTEM if seeing else None
            run = train(base, root / f"run-{out.name}", language, seeing=seeing, template=kind, system=system)
            found[out.name] = Prompts.of(Exported.of(run, out, quant="fp32"), base / "1.png")
    return found


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
    for (name, given), rows in zip(prompts.items(), node(tasks), strict=True):
        for chat, trained, ids in zip(given.chats, given.trained, rows, strict=True):
            assert ids == trained, (name, chat)


def test_the_placeholder_has_no_row_in_the_head_and_is_the_next_id_of_the_tokenizer(
    prompts: dict[str, Prompts], byte_level: Any, spaced: Any
) -> None:
    assert len(byte_level) < len(spaced) == VOCABULARY
    for name in ("chat-True", "lavin-True"):
        tokenizer = AutoTokenizer.from_pretrained(prompts[name].exported.folder)
        assert tokenizer.convert_tokens_to_ids(PLACEHOLDER) == VOCABULARY
        assert len(tokenizer) == VOCABULARY + 1


def test_a_text_model_refuses_images_in_the_template(text: dict[str, Exported]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text["int4"].folder)
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


def test_onnxruntime_genai_resizes_images_as_training_does(
    genai: Any, vision: dict[str, Exported], tmp_path: Path
) -> None:
    wide, exported = noise(tmp_path / "wide.png", 50, 90), vision["int4"]
    processor = genai.Model(str(exported.folder)).create_multimodal_processor()
    pixels = processor(PLACEHOLDER, images=genai.Images.open(str(wide)))["pixel_values"].as_numpy()
    np.testing.assert_allclose(pixels[0, 0], exported.images(wide).numpy(), atol=1e-6)


def test_transformers_js_resizes_images_nearly_as_training_does(
    node: Callable[..., Any], vision: dict[str, Exported], tmp_path: Path
) -> None:
    wide, exported = noise(tmp_path / "wide.png", 50, 90), vision["int4"]
    (found,) = node([{"folder": str(exported.folder), "image": str(wide)}])
    levels = np.abs(np.reshape(found["values"], found["dims"])[0] - exported.images(wide).numpy()) * 0.5 * 255
    assert levels.mean() < 1.5


def test_transformers_reads_the_configuration_of_a_model_with_vision(vision: dict[str, Exported]) -> None:
    config = AutoConfig.from_pretrained(vision["int4"].folder)
    assert config.model_type == "llava"
    assert config.image_token_index == VOCABULARY
    assert config.text_config.vocab_size == VOCABULARY


def test_no_file_that_a_client_reads_names_the_place_where_the_model_came_from(
    vision: dict[str, Exported], base: Path
) -> None:
    files = [path for path in vision["int4"].folder.iterdir() if path.is_file()]
    naming = {path.name for path in files if str(base) in path.read_text(encoding="utf-8")}
    assert naming <= {"lavintk_export.json", "README.md"}


def test_a_graph_that_transformers_js_would_not_find_is_refused(byte_level: Any) -> None:
    graphs = {"decoder": "onnx/model_int3.onnx"}
    with pytest.raises(ModelError, match=r"would not find onnx/model_int3\.onnx"):
        model_config(FolderDescription(LlamaConfig(), byte_level, "chat", (2,), 256, graphs))


def test_graphs_of_different_precision_are_named_one_by_one(vision: dict[str, Exported]) -> None:
    hints = vision["int4"].json("config.json")["transformers.js_config"]
    assert hints["dtype"] == {"decoder_model_merged": "q4", "vision_encoder": "fp16", "embed_tokens": "int8"}
    files = ("decoder_model_merged_q4.onnx", "vision_encoder_fp16.onnx", "embed_tokens_int8.onnx")
    assert hints["use_external_data_format"] == dict.fromkeys(files, 1)
    same = vision["fp32"].json("config.json")["transformers.js_config"]
    assert same["dtype"] == "fp32"


def write_sentencepiece_like_tokenizer(folder: Path) -> Path:
    """Write a tokenizer built as LLaMA's: a space in front of every text, bytes for unknown characters, a BOS."""
    backend: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    cut = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut)  # so that no token goes across words, as in LLaMA's
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    texts = ["Instruction: what color is the shape? Response: red", "Image: N/A is there a blue circle? yes or no"]
    backend.train_from_iterator(texts * 4, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    backend = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    make: Any = PreTrainedTokenizerFast
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    make(tokenizer_object=backend, **roles).save_pretrained(folder)
    return folder
