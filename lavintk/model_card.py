"""``README.md`` of an exported folder: what it is, what it was made from, how it is used, how near it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavintk.run import Run

FRONT_MATTER_LICENCE = re.compile(r"---\n(?:(?!---).*\n)*?license:\s*[\"']?(?P<name>[^\s\"']+)")
"""The licence in the head of a model page on the Hugging Face hub."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
LICENCE_ID = re.compile(r"[\w.+-]+", re.ASCII)
"""What may be one of the hub's names of licences, such as ``apache-2.0``; else it is the title of a text."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
GRIDS = {
    "fp32": "32-bit floats",
    "fp16": "16-bit floats",
    "int8": "8-bit integers",
    "int4": "4-bit integers in blocks",
    "nf4": "4-bit NormalFloat in blocks",
}
WHERE_IT_COUNTS = "see where it came from; it holds for this folder too"


def card(content: Mapping[str, Any]) -> str:
    """Return the page as Markdown.

    :param content: of ``lavintk_export.json``; what it does not hold is left out of the page.
    """
    name = _section(content, "run").get("name") or "model"
    head = front_matter("onnx", _section(content, "base"), sees=_sees(content), tags=("lavintk", "onnx"))
    lines = [*head, f"# {name}", ""]
    lines += _paragraphs(_what_it_is(content))
    for title, part in (
        ("Made from", _made_from(content)),
        ("Prompt", _prompt(content)),
        ("Use", _use(content)),
        ("From the trained grid to this one", _rounding(content)),
        ("How near it is to the trained model", _figures(content)),
    ):
        found = list(part)
        lines += [f"## {title}", "", *found, ""] if found else []
    return "\n".join(lines).rstrip() + "\n"


def front_matter(
    library: str, base: Mapping[str, Mapping[str, str]], *, sees: bool, tags: Sequence[str] = ("lavintk",)
) -> list[str]:
    """Return the head of a model page as the Hugging Face hub reads it; what is not known is left out.

    A licence is named where that of every base model is known; bases with different ones give ``other``.

    :param library: that loads the folder, as the hub calls it.
    :param base: of :func:`with_provenance`.
    :param sees: the folder takes images too.
    """
    lines = ["---", f"library_name: {library}"]
    lines += [f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}"]
    known = {entry.get("licence", "").lower() for entry in base.values()}
    if known and "" not in known:
        first, *others = known
        lines.append(f"license: {'other' if others or not LICENCE_ID.fullmatch(first) else first}")
    if ids := [entry["hub_id"] for entry in base.values() if entry.get("hub_id")]:
        lines += ["base_model:", *(f"- {hub_id}" for hub_id in ids)]
    return [*lines, f"tags: [{', '.join(tags)}]", "---"]


def with_provenance(content: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return ``content`` with what the run says of its data and the base models of their licences, where missing."""
    manifest = run.manifest
    facts = {key: manifest.get(key) for key in ("started", "steps", "data", "tokens", "imported")}
    known = {"name": run.recipe.name, **facts}
    given = {key: value for key, value in _section(content, "run").items() if value is not None}
    base = {role: dict(entry) for role, entry in _section(content, "base").items()}
    for role, reference in (("language", run.recipe.model.language), ("vision", run.recipe.model.vision)):
        if role not in base or not reference:
            continue
        for key, find in (("licence", licence_of), ("hub_id", hub_id_of)):
            if key not in base[role] and (found := find(reference)):
                base[role][key] = found
    return {**content, "run": {**known, **given}, "base": base}


def origin(run: Run) -> str:
    """Return what an export of ``run`` was made from, for a sentence."""
    imported = _section(run.manifest, "imported")
    if "model" not in imported:
        return f"the run `{run.recipe.name}`"
    adapter = _section(imported, "adapter").get("folder")
    return f"the model folder `{imported['model']}`" + (f" and the adapter folder `{adapter}`" if adapter else "")


def made_from(run: Run, base: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return what an export of ``run`` was made from, as lines of a list in Markdown.

    :param base: fingerprints of the frozen models by role.
    """
    content = with_provenance({"base": base}, run)
    lines = []
    for role, found in content["base"].items():
        licence = f", licence {found['licence']}" if "licence" in found else ""
        lines.append(f"- {role}: {found['source']}, sha256 `{found['sha256']}`{licence}")
    if imported := _imported_adapter(content["run"]):
        return [*lines, imported]
    lines += [] if run.recipe.adapter is None else [f"- adapter: `{run.recipe.adapter}`"]
    return lines + ([] if run.recipe.data.train is None else [f"- base stored in training as: `{run.recipe.quant}`"])


def hub_id_of(reference: str) -> str | None:
    """Return where a base model lies on the Hugging Face hub, or None where its name does not say.

    :param reference: as ``model.language`` of a recipe.
    """
    from lavintk.models.catalog import CATALOG

    if Path(reference).expanduser().exists():
        return None
    if reference in CATALOG:
        return CATALOG[reference].hub_id
    return reference if HUB_ID.fullmatch(reference) else None


def licence_of(reference: str) -> str | None:
    """Return the name of a base model's licence as its own files give it, or None where they do not.

    Looks at the catalog, the head of ``README.md``, the first line of a licence file and GGUF metadata. Uses no
    network.

    :param reference: as ``model.language`` of a recipe.
    """
    from lavintk.models.catalog import CATALOG
    from lavintk.models.download import cached_snapshot

    path: Path | None = Path(reference).expanduser()
    if path is not None and not path.exists():
        if reference in CATALOG:
            return CATALOG[reference].licence
        path = cached_snapshot(reference) if "/" in reference else None
    if path is None:
        return None
    return _licence_in_folder(path) if path.is_dir() else _licence_in_file(path)


def _licence_in_folder(folder: Path) -> str | None:
    page = folder / "README.md"
    if page.is_file() and (found := FRONT_MATTER_LICENCE.match(page.read_text(encoding="utf-8", errors="replace"))):
        return found["name"]
    for pattern in LICENCE_FILES:
        for path in sorted(folder.glob(pattern)):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
            if title := next((line.strip() for line in lines if line.strip()), ""):
                return f"{title} ({path.name} of the base)"
    return None


def _licence_in_file(file: Path) -> str | None:
    if file.suffix.lower() != ".gguf":
        return None
    from lavintk.models.gguf_source import read_header

    metadata = read_header(file).metadata
    found = metadata.get("general.license") or metadata.get("general.license.name")
    return found if isinstance(found, str) else None


def _what_it_is(content: Mapping[str, Any]) -> Iterator[str]:
    run, quant, adapter = (_section(content, name) for name in ("run", "quant", "adapter"))
    imported = _section(run, "imported")
    from_folder = "model" in imported
    of = f" from the {'folder' if from_folder else 'run'} `{run['name']}`" if run.get("name") else ""
    kind = "language model that also sees images" if _sees(content) else "language model"
    # whether a bare model folder was fine-tuned is not known
    kind = kind if from_folder and not imported.get("adapter") else f"fine-tuned {kind}"
    yield f"A {kind}, exported to ONNX by lavintk {content.get('lavintk', '')}{of}."
    if grid := quant.get("grid"):
        words = f"**Weights.** The linear layers are stored as {grid} ({GRIDS.get(grid, 'its own format')})"
        words += f"; trained on {quant['trained']}" if quant.get("trained") else ""
        words += ", with the trained base copied bit by bit" if quant.get("copied") else ""
        others = [f"{part} {quant[part]}" for part in ("embed", "head", "vision") if quant.get(part)]
        yield words + "." + (f" The rest: {', '.join(others)}." if others else "")
    if adapter.get("name"):
        form = {"merge": "folded into the weights", "side": "beside the weights as low-rank nodes"}
        how = form.get(str(adapter.get("form")), str(adapter.get("form", "in an unknown form")))
        why = f" ({adapter['reason']})" if adapter.get("reason") else ""
        yield f"**Adapter.** `{adapter['name']}`, {how}{why}."
    if "image" in _decoders(content) and "text" in _decoders(content):
        yield (
            "**Two decoders.** The adapter has other weights for prompts with an image than for text alone, and each "
            "has its decoder. lavintk takes the right one by itself; other programs read one, that for images."
        )


def _made_from(content: Mapping[str, Any]) -> Iterator[str]:
    for role, base in _section(content, "base").items():
        licence = base.get("licence")
        says = f"licence {licence}, which holds for this folder too" if licence else f"licence: {WHERE_IT_COUNTS}"
        yield f"- {role} model: {base.get('source', 'unknown')}, sha256 `{base.get('sha256', 'unknown')}`; {says}"
    run = _section(content, "run")
    if adapter := _imported_adapter(run):
        yield adapter
    data, tokens = _section(run, "data"), _section(run, "tokens")
    if data:
        words = [f"{data['records']:,} records"] if isinstance(data.get("records"), int) else []
        words += [f"sha256 `{data['sha256']}`"] if data.get("sha256") else []
        for key, text in (("rows", "rows"), ("trained", "trained tokens"), ("images", "images")):
            words += [f"{tokens[key]:,} {text}"] if isinstance(tokens.get(key), int) else []
        yield f"- training data: {', '.join(words)}"
    if run.get("steps"):
        began = f", begun {run['started']}" if run.get("started") else ""
        yield f"- training: {run['steps']:,} steps{began}"


def _imported_adapter(run: Mapping[str, Any]) -> str:
    """Return the line of a list that says which adapter's folder was imported; empty where none was."""
    adapter = _section(_section(run, "imported"), "adapter")
    if not adapter:
        return ""
    folder, sha256, read_as = (adapter.get(key) for key in ("folder", "sha256", "read_as"))
    return f"- adapter folder: {folder}, sha256 `{sha256}`, read as `{read_as}`"


def _prompt(content: Mapping[str, Any]) -> Iterator[str]:
    prompt = _section(content, "prompt")
    forms = {
        "chat": "the tokenizer's chat template",
        "plain": "lavintk's plain form",
        "lavin": "LaVIN's instruction form",
    }
    template = str(prompt.get("template", "chat"))
    form = forms.get(template, f"the template `{template}`")
    system = prompt.get("system")
    said = f"The system message of training was {system!r}; it is put in front of conversations that bring none."
    yield f"Prompts have {form}, which `chat_template.jinja` holds." + (f" {said}" if system else "")
    if _sees(content):
        yield ""
        yield f"An image becomes {prompt.get('visual_tokens')} tokens in the place of `<|image_pad|>`."


def _use(content: Mapping[str, Any]) -> Iterator[str]:
    seeing = _sees(content)
    for title, language, text in (
        ("lavintk", "python", LAVINTK_IMAGE if seeing else LAVINTK_TEXT),
        ("onnxruntime-genai", "python", GENAI_IMAGE if seeing else GENAI_TEXT),
        ("transformers.js", "js", JS_HEAD + (JS_IMAGE if seeing else JS_TEXT)),
    ):
        yield from (f"{title}:", "", f"```{language}", *text.strip().splitlines(), "```", "")
    yield "The examples run beside this folder, here called `exported`."


def _rounding(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what rounding and tuning on another grid than the trained one left."""
    found = _section(_section(content, "report"), "requantized")
    rounded, retuned = _section(found, "rounded"), _section(found, "retuned")
    if not rounded:
        return
    tokens = rounded.get("tokens")
    on = f" on {tokens:,} answer tokens of training rows that calibrated nothing" if isinstance(tokens, int) else ""
    yield f"In torch, before anything was written, beside the trained model{on}:"
    yield from ("", "| | mean KL | same first choice |", "|---|---|---|")
    how = f"rounded with {found['rows']:,} training rows in mind" if found.get("rows") else "rounded"
    yield _fidelity(f"{how}, before tuning" if retuned else how, rounded)
    if retuned:
        undone = not retuned.get("divergence", 0) <= rounded.get("divergence", 0)
        yield _fidelity(f"after {found.get('steps', 0):,} steps of tuning{', undone' * undone}", retuned)


def _fidelity(title: str, figures: Mapping[str, Any]) -> str:
    return f"| {title} | {_shown(figures.get('divergence'), '.1e')} | {_shown(figures.get('agreement'), '.1%')} |"


def _figures(content: Mapping[str, Any]) -> Iterator[str]:
    found = _section(_section(content, "report"), "verification")
    if not found:
        return
    yield f"On {found['whole']['rows']} rows of {found['data']}; all positions of each row are compared."
    yield from ("", "| | " + " | ".join(found["parts"]) + " |", "|---" * (1 + len(found["parts"])) + "|")
    for key, title, form in FIGURES:
        values = [_shown(part.get(key), form) for part in found["parts"].values()]
        yield f"| {title} | {' | '.join(values)} |"
    yield ""
    for key, title in (("answers", "answers"), ("free_text", "free text, not stopped at end tokens")):
        if part := found.get(key):
            yield (
                f"- greedy {title}: {part['identical']:.1%} of {part['answers']} identical, together for "
                f"{part['common_prefix']:.1f} of {part['tokens']:.1f} tokens"
            )
    if scores := found.get("scores"):
        for name, trained in scores["trained"].items():
            if name != "questions":
                pair = f"{_shown(trained, '.4g')} trained, {_shown(scores['exported'].get(name), '.4g')} exported"
                yield f"- {name} on {scores['questions']} questions: {pair}"
    yield f"- size: {found['folder_bytes'] / 1e6:,.1f} MB"
    if found.get("exported_tokens_per_second"):
        trained = _shown(found.get("trained_tokens_per_second"), ".1f")
        own = f", {trained} of the trained model in torch" if trained != "-" else ""
        yield f"- decoding one row where this was measured: {found['exported_tokens_per_second']:.1f} tokens/s{own}"
    yield from (f"- note: {note}" for note in found.get("notes") or ())
    yield from (f"- **out of bounds**: {fault}" for fault in found.get("faults") or ())


FIGURES = (
    ("divergence", "KL divergence, mean (nats)", ".2e"),
    ("largest_divergence", "KL divergence, largest", ".2e"),
    ("agreement", "same first choice", ".2%"),
    ("difference", "largest logit difference", ".2e"),
    ("trained_perplexity", "perplexity, trained", ",.3f"),
    ("exported_perplexity", "perplexity, exported", ",.3f"),
)
"""Key in the report, title and form of a number."""


def _shown(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def _decoders(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return _section(_section(content, "graphs"), "decoder")


def _sees(content: Mapping[str, Any]) -> bool:
    return bool(_section(content, "graphs").get("vision"))


def _paragraphs(lines: Iterator[str]) -> list[str]:
    return [part for line in lines for part in (line, "")]


LAVINTK_TEXT = """
from lavintk.runtime import load

model = load("exported")
print(model.generate("What colour is the sky?"))
"""
LAVINTK_IMAGE = """
from lavintk.runtime import load

model = load("exported")
print(model.generate("What is this?", image="picture.png"))
"""
GENAI_TEXT = """
import json
import onnxruntime_genai as genai

model = genai.Model("exported")
tokenizer = genai.Tokenizer(model)
messages = [{"role": "user", "content": "What colour is the sky?"}]
ids = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + 64, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(ids):]))
"""
GENAI_IMAGE = """
import json
import onnxruntime_genai as genai

model = genai.Model("exported")
tokenizer = genai.Tokenizer(model)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
inputs = model.create_multimodal_processor()(prompt, images=genai.Images.open("picture.png"))
length = inputs["input_ids"].as_numpy().shape[1]
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=length + 64, do_sample=False)
generator = genai.Generator(model, parameters)
generator.set_inputs(inputs)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[length:]))
"""
JS_HEAD = """
import * as library from '@huggingface/transformers';

library.env.allowRemoteModels = false;
library.env.localModelPath = './';
"""
JS_TEXT = """
const tokenizer = await library.AutoTokenizer.from_pretrained('exported');
const model = await library.AutoModelForCausalLM.from_pretrained('exported');
const messages = [{ role: 'user', content: 'What colour is the sky?' }];
const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
const ids = await model.generate({ ...inputs, max_new_tokens: 64 });
const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(tokenizer.batch_decode(answer, { skip_special_tokens: true })[0]);
"""
JS_IMAGE = """
const processor = await library.AutoProcessor.from_pretrained('exported');
const model = await library.AutoModelForImageTextToText.from_pretrained('exported');
const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: 'What is this?' }] }];
const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
const inputs = await processor(await library.RawImage.read('picture.png'), prompt);
const ids = await model.generate({ ...inputs, max_new_tokens: 64 });
const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0]);
"""
