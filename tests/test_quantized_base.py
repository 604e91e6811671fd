"""Quantized bases on disk: the same bits as quantizing gives, without reading the original weights."""

import errno
import io
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from lavintk.layers import DenseLinear, FrozenLinear
from lavintk.models import base_cache, quantized_base
from lavintk.models.base_cache import kept_bases, make_base, opened, quantized_folder, wanted_base
from lavintk.models.build import build
from lavintk.models.language import LANGUAGE_STACK, StreamedLinear, load_language_model
from lavintk.models.quantized_base import MANIFEST, QuantizedBase
from lavintk.models.sources import SAMPLE_BYTES, FileSource, _samples, open_source, read_header
from lavintk.plugins import installed_plugins, load_plugins
from lavintk.recipe import make_recipe
from lavintk.registry import Choice
from lavintk.run import Run
from lavintk.testing import Outcome
from lavintk.testing.runs import recipe, write_everything
from lavintk.testing.tiny import write_language_model
from lavintk.training import train
from tests.test_import import write_delta

RunCli = Callable[..., Outcome]
CPU = torch.device("cpu")
Usage = namedtuple("Usage", "total used free")
QUANTS = ("nf4", "nf4:double_quant=false", "fp4", "int8", "int4", "int4:block_size=64", "hqq")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},  # with biases
    "qwen3": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_language_model(tmp_path_factory.mktemp(name), name, hidden_size=128, intermediate_size=256, **extra)
        for name, extra in MODELS.items()
    }


def load(
    folder: Path, quant: str = "nf4", *, cache: object = True, lines: list[str] | None = None, **changes: Any
) -> nn.Module:
    """Build the model of a recipe as a run does."""
    dtype, stream = changes.pop("dtype", torch.float32), changes.pop("stream", False)
    device, outside = changes.pop("device", CPU), changes.pop("outside", "none")
    trained = {key: changes.pop(key, None) for key in ("trained_in", "trained_on")}
    embed_quant = changes.pop("embed_quant", "none")
    model = {"language": str(folder), "cache": cache, **changes}
    asked = make_recipe(
        {"model": model, "quant": quant, "embed_quant": embed_quant, "adapter": None, "data": {"train": None}}
    )
    say = None if lines is None else lines.append
    return build(
        asked, installed_plugins(), device, dtype, stream=stream, say=say, outside=outside, **trained
    ).model.language  # fmt: skip


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of all that a model holds."""

    def stored(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return tensor.dtype, tuple(tensor.shape), bytes(content.numpy())

    return {name: stored(tensor) for name, tensor in model.state_dict().items()}


def logits(model: nn.Module) -> Tensor:
    from lavintk.data.batch import IGNORED, Batch
    from lavintk.models.multimodal import MultimodalModel

    ids = torch.arange(5, 30)
    batch = Batch(
        ids, ids.roll(-1).index_fill(0, torch.tensor([24]), IGNORED), torch.arange(25), (25,), torch.zeros(1).long(),
        None, torch.zeros(0, dtype=torch.int64), ("row",),
    )  # fmt: skip
    whole = MultimodalModel(model).eval()
    with torch.no_grad():
        return whole.logits(whole.hidden(batch))


def no_weights(*_: object) -> Tensor:
    raise AssertionError("a weight of the original was read")


def the_entry() -> QuantizedBase:
    (entry,) = kept_bases()
    return entry


# -- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_kept_base_is_bit_for_bit_what_quantizing_gives_and_reads_no_original_weight(
    folders: dict[str, Path], name: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quant == "hqq":
        pytest.importorskip("hqq")
    quantized = load(folders[name], quant, cache=False)
    assert not quantized_folder().exists()
    load(folders[name], quant)
    monkeypatch.setattr(FileSource, "read", no_weights)
    kept = load(folders[name], quant)
    assert bits(kept) == bits(quantized)
    assert torch.equal(logits(kept), logits(quantized))
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    if MODELS[name]["tie_word_embeddings"]:
        assert kept.get_parameter("lm_head.weight") is kept.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_quantized_embedding_comes_along(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = load(folders[name], embed_quant="int8", cache=False)
    load(folders[name], embed_quant="int8")
    monkeypatch.setattr(FileSource, "read", no_weights)
    kept = load(folders[name], embed_quant="int8")
    assert bits(kept) == bits(quantized)
    assert torch.equal(logits(kept), logits(quantized))


@pytest.mark.parametrize(("dtype", "trained_in"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_types_are_those_of_quantizing(
    folders: dict[str, Path], dtype: torch.dtype, trained_in: torch.dtype | None
) -> None:
    quantized = load(folders["qwen2"], cache=False, dtype=dtype, trained_in=trained_in)
    load(folders["qwen2"], dtype=dtype, trained_in=trained_in)
    assert bits(load(folders["qwen2"], dtype=dtype, trained_in=trained_in)) == bits(quantized)
    assert the_entry().manifest["origin"]["types"] == (
        ["bfloat16"] if trained_in is None else ["bfloat16", "float32"]
    )  # fmt: skip


def test_bytes_that_the_fingerprint_does_not_cover_are_not_read_a_second_time(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    first = load(folder)
    file = folder / "model.safetensors"
    before, content = open_source(folder).fingerprint(), bytearray(file.read_bytes())
    for tensor in read_header(file)[1].values():
        samples = _samples(tensor.nbytes)
        for (start, _), (stop, _) in pairwise(samples):
            begin, end = tensor.begin + start + SAMPLE_BYTES, tensor.begin + stop
            content[begin:end] = bytes(max(0, end - begin))
    file.write_bytes(content)
    assert open_source(folder).fingerprint() == before
    assert bits(load(folder)) == bits(first)
    assert bits(load(folder, cache=False)) != bits(first)  # so the bytes do count


def test_another_original_at_the_same_place_is_another_base(tmp_path: Path) -> None:
    load(write_language_model(tmp_path / "model"))
    changed = write_language_model(tmp_path / "model", seed=1)
    found = load(changed)
    assert bits(found) == bits(load(changed, cache=False))
    assert len(kept_bases()) == 2


def test_layers_that_are_read_when_they_are_asked_for_come_from_the_kept_base(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(folders["qwen2"], "int4")
    monkeypatch.setattr(FileSource, "read", no_weights)
    streamed = load(folders["qwen2"], "int4", stream=True)
    layers = {name: m for name, m in streamed.named_modules() if isinstance(m, StreamedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert bits(layer.layer()) == bits(whole.get_submodule(name))
    assert torch.equal(logits(streamed), logits(whole))


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("embed_quant", ["none", "nf4"])
def test_on_a_gpu_kept_bases_are_those_of_quantizing_there(
    folders: dict[str, Path], quant: str, embed_quant: str, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "embed_quant": embed_quant}
    expected = load(folders["qwen2"], quant, cache=False, **settings)
    load(folders["qwen2"], quant, **settings)
    by_run = {path.name: path.read_bytes() for path in the_entry().folder.glob("*.safetensors")}
    shutil.rmtree(the_entry().folder)
    command = ("--quant", quant, "--embed-quant", embed_quant, "--precision", "bf16", "--device", "cuda")
    assert run_cli("models", "quantize", str(folders["qwen2"]), *command).exit_code == 0
    assert {path.name: path.read_bytes() for path in the_entry().folder.glob("*.safetensors")} == by_run
    monkeypatch.setattr(FileSource, "read", no_weights)
    kept = load(folders["qwen2"], quant, **settings)
    assert bits(kept) == bits(expected)
    assert {tensor.device.type for tensor in kept.state_dict().values()} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["nf4", "nf4:double_quant=false", "int8", "int4"])
def test_what_a_gpu_kept_is_what_a_cpu_loads_of_its_training(
    folders: dict[str, Path], quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load(folders["qwen2"], quant, device=torch.device("cuda"), dtype=torch.bfloat16)
    forbid_quantizing(monkeypatch, quant)
    found = load(folders["qwen2"], quant, trained_in=torch.bfloat16, trained_on="cuda")
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name].cpu().to(tensor.dtype)), name
    for name, layer in found.named_modules():
        if isinstance(layer, FrozenLinear):
            on_gpu = trained.get_submodule(name)
            assert isinstance(on_gpu, FrozenLinear)
            torch.testing.assert_close(layer.dequantize(torch.float32), on_gpu.dequantize(torch.float32).cpu())


# -- the files -------------------------------------------------------------------------------------------------------


def test_a_layer_lies_without_gaps_in_files_that_safetensors_reads(folders: dict[str, Path]) -> None:
    held = load(folders["qwen2"]).state_dict()
    entry = the_entry()
    for index in range(2):
        tensors = entry.layer_bytes(index)
        assert {t.name for t in tensors} == {name for name in held if name.startswith(f"{LANGUAGE_STACK}{index}.")}
        assert len({tensor.file for tensor in tensors}) == 1
        assert tensors[0].begin % quantized_base.PAGE == 0
        ends = [tensor.begin + tensor.nbytes for tensor in tensors]
        assert [tensor.begin for tensor in tensors[1:]] == ends[:-1]
        assert tensors[0].file.stat().st_size == ends[-1]
        with safe_open(tensors[0].file, framework="pt") as file:
            for tensor in tensors:
                assert torch.equal(file.get_tensor(tensor.name), held[tensor.name]), tensor.name
                assert tensor.begin % held[tensor.name].itemsize == 0
                assert tensor.nbytes % 16 or tensor.begin % 16 == 0


def test_files_have_a_largest_size(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_base, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(quantized_base, "PIECE_BYTES", 1_000)
    first = load(folders["llama"])
    sizes = [path.stat().st_size for path in the_entry().folder.glob("layer*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 40_000 + quantized_base.PAGE
    assert bits(load(folders["llama"])) == bits(first)


def test_finished_layers_are_handed_over_in_the_order_of_the_stack(folders: dict[str, Path]) -> None:
    model, handed = load(folders["llama"]), dict[str, nn.Module]()
    source, quantizer = open_source(folders["llama"]), installed_plugins().quantizers.create(Choice("nf4"))
    entry = the_entry()

    class Handing(QuantizedBase):
        def fill(self, *arguments: Any, **options: Any) -> None:
            super().fill(*arguments, **{**options, "place": handed.__setitem__})

    load_language_model(source, quantizer, device=CPU, dtype=torch.float32, kept=Handing(entry.folder, entry.manifest))
    assert [int(name.split(".")[2]) for name in handed] == [0] * 7 + [1] * 7
    assert all(bits(layer) == bits(model.get_submodule(name)) for name, layer in handed.items())


@pytest.mark.parametrize("outside", ["cpu", "disk"])
def test_layers_that_wait_outside_of_the_device_come_from_the_kept_base(
    folders: dict[str, Path], outside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folders["qwen2"], outside=outside)
    change_one_bit(the_entry())
    again = load(folders["qwen2"], outside=outside)  # begins with the damaged one, and then anew
    monkeypatch.setattr(FileSource, "read", no_weights)
    kept = load(folders["qwen2"], outside=outside)
    assert bits(kept) == bits(again) == bits(first) == bits(load(folders["qwen2"]))


# -- what is not used ------------------------------------------------------------------------------------------------


def cut(entry: QuantizedBase) -> None:
    path = entry.folder / "layer-00001-01.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_one_bit(entry: QuantizedBase) -> None:
    path = entry.folder / "layer-00001-01.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def spoil_a_header(entry: QuantizedBase) -> None:
    path = entry.folder / "rest-01.safetensors"
    path.write_bytes(b"\0" * 20 + path.read_bytes()[20:])


def remove_a_file(entry: QuantizedBase) -> None:
    (entry.folder / "rest-01.safetensors").unlink()


def remove_the_manifest(entry: QuantizedBase) -> None:
    (entry.folder / MANIFEST).unlink()


def be_another_one(entry: QuantizedBase) -> None:
    content = json.loads((entry.folder / MANIFEST).read_text())
    content["origin"]["weights"] = "0" * 64
    (entry.folder / MANIFEST).write_text(json.dumps(content))


def be_of_a_later_layout(entry: QuantizedBase) -> None:
    content = json.loads((entry.folder / MANIFEST).read_text())
    (entry.folder / MANIFEST).write_text(json.dumps({**content, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "should have"),
        (change_one_bit, "checksum"),
        (spoil_a_header, "is damaged"),
        (remove_a_file, "is missing"),
        (remove_the_manifest, "cannot be read"),
        (be_another_one, "describes another base"),
        (be_of_a_later_layout, "layout 99"),
    ],
)
def test_a_damaged_base_is_named_and_made_anew(
    folders: dict[str, Path], damage: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_cache, "FREE_SHARE", 0.0)  # however full this machine's disk is
    monkeypatch.setattr(base_cache, "FREE_BYTES", 0)
    first, lines = load(folders["llama"]), list[str]()
    damage(the_entry())
    again = load(folders["llama"], cache="auto", lines=lines)
    assert bits(again) == bits(first)
    assert len(lines) == 2, lines
    assert lines[0].startswith("note:")
    assert said in lines[0]
    assert lines[1].startswith(f"kept the quantized base: {the_entry().folder}")
    lines.clear()
    assert bits(load(folders["llama"], lines=lines)) == bits(first)
    assert lines == []


def test_a_base_of_other_shapes_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the code of the core changed and the key did not."""
    lines = list[str]()
    monkeypatch.setattr(base_cache.Wanted, "folder", property(lambda _: quantized_folder() / "one"))
    load(folders["llama"])
    monkeypatch.setattr(base_cache, "opened", lambda wanted: QuantizedBase.open(wanted.folder))
    found = load(folders["qwen2"], lines=lines)
    assert "is missing" in lines[0] or "cannot be put back" in lines[0]
    assert bits(found) == bits(load(folders["qwen2"], cache=False))


def test_nothing_is_kept_where_nothing_is_quantized(folders: dict[str, Path]) -> None:
    load(folders["llama"], "none")
    load(folders["llama"], cache=False)
    load(folders["llama"], cache="auto")  # too small
    assert not quantized_folder().exists()


def test_a_large_base_is_kept_by_itself_where_the_disk_has_room(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = list[str]()
    monkeypatch.setattr(base_cache, "SMALLEST", 1000)
    free = base_cache.FREE_BYTES + 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(5 * 10**10, 0, free))
    load(folders["llama"], cache="auto", lines=lines)
    assert len(lines) == 1
    assert "is not kept on disk" in lines[0]
    assert kept_bases() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**11))  # less than a fifth
    load(folders["llama"], cache="auto", lines=lines)
    assert kept_bases() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(5 * 10**10, 0, 2 * free))
    load(folders["llama"], cache="auto", lines=lines)
    assert lines[2].startswith(f"kept the quantized base: {the_entry().folder}, ")


def test_a_disk_that_fills_up_while_writing_ends_nothing_and_keeps_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, write = list[str](), quantized_base._write_file

    def full(path: Path, tensors: Any) -> Any:
        if path.name.startswith("layer-00001"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(quantized_base, "_write_file", full)
    found = load(folders["llama"], lines=lines)
    assert bits(found) == bits(load(folders["llama"], cache=False))
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert list(quantized_folder().iterdir()) == []


def test_what_an_ended_process_left_behind_is_removed(folders: dict[str, Path]) -> None:
    left = quantized_folder() / "abc.999999999.partial"
    left.mkdir(parents=True)
    load(folders["llama"])
    assert not left.exists()
    assert [path.name for path in quantized_folder().iterdir()] == [the_entry().folder.name]


def test_layers_that_cannot_be_put_back_are_not_kept(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful:
        requires_cuda = False

        def quantize(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
            return DenseLinear(weight.detach() * 2, bias)

        def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> DenseLinear:
            raise RuntimeError("no idea how")

    plugins, lines = load_plugins(), list[str]()
    plugins.quantizers.owned_by("core").add("forgetful", lambda _: Forgetful())
    monkeypatch.setattr("tests.test_quantized_base.installed_plugins", lambda: plugins)
    load(folders["llama"], "forgetful", lines=lines)
    assert len(lines) == 1
    assert "cannot be put back: no idea how" in lines[0]
    assert kept_bases() == []


def test_a_second_training_and_what_loads_its_run_read_no_original_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe(write_everything(tmp_path), max_steps=2) | {"quant": "nf4"}
    content["model"]["cache"] = True
    output = io.StringIO()
    console = Console(file=output, width=200)
    first = train(content, tmp_path / "first", console=console)
    assert output.getvalue().count("kept the quantized base: ") == 1
    monkeypatch.setattr(FileSource, "read", no_weights)
    second = train(content, tmp_path / "second", console=console)
    assert output.getvalue().count("kept the quantized base: ") == 1
    assert bits(second.assembly.model) == bits(first.assembly.model)
    assert bits(Run.open(tmp_path / "first").load().assembly.model) == bits(first.assembly.model)


# -- the base of the training ----------------------------------------------------------------------------------------


def no_quantizing(*_: object) -> FrozenLinear:
    raise AssertionError("something was quantized")


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    """Let nothing be read of the original and nothing be quantized."""
    monkeypatch.setattr(FileSource, "read", no_weights)
    monkeypatch.setattr(type(installed_plugins().quantizers.create(Choice.parse(quant))), "quantize", no_quantizing)


def call_it_made_on_cuda(source: Path, quant: str, embed_quant: str = "none") -> QuantizedBase:
    """Make the entry, which a CPU made in bf16, one of a GPU: under its key, in its place."""
    entry, opened_source = the_entry(), open_source(source)
    wanted = wanted_base(
        opened_source, opened_source.fingerprint(), installed_plugins(), Choice.parse(quant), Choice.parse(embed_quant),
        [torch.bfloat16], torch.device("cuda"),
    )  # fmt: skip
    assert wanted is not None
    content = json.loads((entry.folder / MANIFEST).read_text())
    (entry.folder / MANIFEST).write_text(json.dumps({**content, "origin": wanted.origin}))
    entry.folder.rename(wanted.folder)
    return opened(wanted)


def in_fp32(folder: Path) -> Run:
    """Open a run so that it is loaded in fp32, as one with the precision ``auto`` is on a CPU."""
    run = Run.open(folder)
    run.recipe = make_recipe(run.recipe.dump(), {"train.precision": "fp32"})
    return run


def answers(run: Run) -> Tensor:
    from lavintk.data.batch import Batch

    ids = torch.arange(5, 30)
    batch = Batch(
        ids, ids, torch.arange(25), (25,), torch.zeros(1).long(), None, torch.zeros(0, dtype=torch.int64), ("row",)
    )
    with torch.no_grad():
        return run.assembly.model.logits(run.assembly.model.hidden(batch))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
@pytest.mark.parametrize("quant", ["nf4", "int4"])
def test_a_run_is_loaded_in_another_type_and_on_another_device_with_the_very_codes_that_were_trained(
    tmp_path: Path, quant: str, made_on: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_everything(tmp_path)
    content = recipe(files, max_steps=2) | {"quant": quant}
    content["model"]["cache"], content["train"]["precision"] = True, "bf16"
    trained = train(content, tmp_path / "run", console=Console(file=io.StringIO()))
    assert trained.manifest["device_type"] == "cpu"
    plain = in_fp32(tmp_path / "run")
    plain.recipe = make_recipe(plain.recipe.dump(), {"model.cache": False})
    plain.load("cpu")
    entry, run = the_entry(), in_fp32(tmp_path / "run")
    if made_on == "cuda":
        entry = call_it_made_on_cuda(Path(content["model"]["language"]), quant)
        run.manifest["device_type"] = "cuda"
    forbid_quantizing(monkeypatch, quant)
    run.load("cpu", stream=stream)
    found, expected = run.assembly.model.language, plain.assembly.model.language
    for name, module in run.assembly.model.linears().items():
        layer = module.layer() if isinstance(module, StreamedLinear) else module
        for leaf, tensor in layer.state_dict().items():
            stored = entry.read(f"{name.removeprefix('language.')}.{leaf}")
            assert tensor.dtype == stored.dtype
            assert torch.equal(tensor, stored), f"{name}.{leaf}"
    parameters = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == parameters.keys()
    for name, parameter in found.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, parameters[name]), name
    assert torch.equal(answers(run), answers(plain))


@pytest.mark.parametrize(("embed_quant", "dtype"), [("int8", torch.float32), ("none", torch.float16)])
@pytest.mark.parametrize("outside", ["none", "cpu", "disk"])
def test_what_is_not_quantized_of_the_trained_base_has_the_type_of_the_load(
    folders: dict[str, Path], embed_quant: str, dtype: torch.dtype, outside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"embed_quant": embed_quant, "dtype": dtype, "trained_in": torch.bfloat16}
    expected = load(folders["qwen2"], cache=False, **settings)  # with biases
    load(folders["qwen2"], embed_quant=embed_quant, dtype=torch.bfloat16)
    call_it_made_on_cuda(folders["qwen2"], "nf4", embed_quant)
    forbid_quantizing(monkeypatch, "nf4")
    found = load(folders["qwen2"], trained_on="cuda", outside=outside, **settings)
    assert bits(found) == bits(expected)
    if outside == "none":
        assert torch.equal(logits(found), logits(expected))


def test_a_base_narrower_than_that_of_the_training_has_its_codes(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = load(folders["qwen2"], "int8", dtype=torch.float32)
    forbid_quantizing(monkeypatch, "int8")
    found = load(folders["qwen2"], "int8", dtype=torch.bfloat16, trained_in=torch.float32, trained_on="cpu")
    assert found.get_parameter("model.norm.weight").dtype == torch.bfloat16
    assert found.get_buffer("model.layers.1.self_attn.q_proj.bias").dtype == torch.bfloat16
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].to(tensor.dtype)), name


def test_without_the_base_of_the_training_the_load_is_as_if_there_had_never_been_one(folders: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"trained_in": torch.bfloat16, "trained_on": "cuda"}
    found = load(folders["llama"], **settings)
    assert bits(found) == bits(load(folders["llama"], cache=False, trained_in=torch.bfloat16))
    assert the_entry().manifest["origin"]["types"] == ["bfloat16", "float32"]
    assert the_entry().manifest["origin"]["device"] == "cpu"


def test_a_damaged_base_of_the_training_is_named_and_left_to_the_next_training(folders: dict[str, Path]) -> None:
    load(folders["llama"], dtype=torch.bfloat16)
    entry, lines = call_it_made_on_cuda(folders["llama"], "nf4"), list[str]()
    cut(entry)
    settings: dict[str, Any] = {"trained_in": torch.bfloat16, "trained_on": "cuda"}
    found = load(folders["llama"], cache="auto", lines=lines, **settings)
    assert bits(found) == bits(load(folders["llama"], cache=False, **settings))
    assert len(lines) == 1
    assert lines[0].startswith(f"note: the base of the training, kept in {entry.folder}, is not used: ")
    assert "should have" in lines[0]
    assert entry.folder.is_dir()


def test_the_base_of_the_training_is_not_used_where_the_recipe_asks_for_none(folders: dict[str, Path]) -> None:
    load(folders["llama"], dtype=torch.bfloat16)
    call_it_made_on_cuda(folders["llama"], "nf4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedBase, "fill", no_weights)
        load(folders["llama"], cache=False, trained_in=torch.bfloat16, trained_on="cuda")


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [
        ({"device_type": "cuda", "device": "NVIDIA H100, 79 GiB"}, "cuda"),
        ({"device": "NVIDIA H100, 79 GiB"}, "cuda"),  # as runs had it before there was a device_type
        ({"device": "CPU, 16 threads"}, "cpu"),
        ({"status": "imported"}, None),
        ({"device_type": "tpu"}, None),
    ],
)
def test_a_run_knows_the_kind_of_device_it_was_trained_on(manifest: dict[str, Any], kind: str | None) -> None:
    content = {"model": {"language": "x"}, "adapter": None, "data": {"train": None}}
    assert Run(Path("run"), make_recipe(content), manifest).trained_on() == kind


# -- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_changes_with_all_that_the_codes_depend_on(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins, source = load_plugins(), open_source(folders["llama"])

    def key(
        quant: str = "nf4",
        embed: str = "none",
        types: tuple[torch.dtype, ...] = (torch.bfloat16,),
        device: str = "cpu",
        fingerprint: str = "a",
    ) -> str:
        choices = Choice.parse(quant), Choice.parse(embed)
        wanted = wanted_base(source, fingerprint, plugins, *choices, types, torch.device(device))
        assert wanted is not None
        return wanted.key

    both = torch.bfloat16, torch.float32
    keys = [
        key(), key("nf4:double_quant=false"), key("nf4:block_size=128"), key("fp4"), key(embed="int8"),
        key(types=both), key(types=both[1:]), key(device="cuda"), key(fingerprint="b"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == key("nf4:double_quant=true,block_size=64") == key(types=(torch.bfloat16, torch.bfloat16)) == keys[0]
    monkeypatch.setattr(base_cache, "version", lambda name: f"another {name}")  # of bitsandbytes
    assert key() != keys[0]
    monkeypatch.undo()
    monkeypatch.setattr(base_cache, "_code", lambda plugin: "changed")
    assert key() != keys[0]


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "int4"])
def test_models_quantize_makes_what_a_run_would_keep(
    folders: dict[str, Path], quant: str, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folders["qwen2"], quant, cache=False)
    command = ("models", "quantize", str(folders["qwen2"]), "--quant", quant, "--precision", "fp32")
    outcome = run_cli(*command)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.splitlines()[0] == str(the_entry().folder)
    assert "made in" in outcome.stdout
    monkeypatch.setattr(FileSource, "read", no_weights)
    assert bits(load(folders["qwen2"], quant, cache="auto")) == bits(expected)
    assert "there already" in run_cli(*command).stdout
    listed = run_cli("models", "list").stdout
    assert the_entry().folder.name in listed.replace("\n", "")
    assert quant in listed


def test_a_base_made_elsewhere_can_be_copied_into_the_cache(
    folders: dict[str, Path], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("models", "quantize", str(folders["llama"]), "--quant", "int8", "--precision", "fp32")
    assert run_cli(*command, "--out", str(tmp_path)).exit_code == 0
    assert not quantized_folder().exists()
    shutil.copytree(tmp_path, quantized_folder())
    monkeypatch.setattr(FileSource, "read", no_weights)
    load(folders["llama"], "int8")


def test_a_base_with_a_delta_is_that_of_a_run_with_the_same_delta(
    folders: dict[str, Path], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = tmp_path / "delta"
    write_delta(delta, folders["llama"])
    expected = load(folders["llama"], "int8", cache=False, delta=str(delta))
    command = ("models", "quantize", str(folders["llama"]), "--quant", "int8", "--precision", "fp32")
    outcome = run_cli(*command, "--delta", str(delta))
    assert outcome.exit_code == 0, outcome.stderr
    assert bits(expected) != bits(load(folders["llama"], "int8", cache=False))
    monkeypatch.setattr(FileSource, "read", no_weights)
    assert bits(load(folders["llama"], "int8", delta=str(delta))) == bits(expected)


def test_models_remove_deletes_the_base_that_is_meant_and_no_other(folders: dict[str, Path], run_cli: RunCli) -> None:
    for name in ("llama", "qwen2"):
        assert run_cli("models", "quantize", str(folders[name]), "--quant", "int8").exit_code == 0
    first, second = sorted(kept.folder.name for kept in kept_bases())
    (quantized_folder() / first / "manifest.json").unlink()  # a damaged one can be removed too
    for key in ("nothing", "", "../quantized"):
        outcome = run_cli("models", "remove", key)
        assert outcome.exit_code == 1
        assert first in outcome.stderr.replace("\n", "")
    assert f"removed {first}, " in run_cli("models", "remove", first[:12]).stdout
    assert [folder.name for folder in quantized_folder().iterdir()] == [second]


def test_a_beginning_that_fits_two_bases_removes_none(folders: dict[str, Path], run_cli: RunCli) -> None:
    for name in ("abc1", "abc2"):
        (quantized_folder() / name).mkdir(parents=True)
    outcome = run_cli("models", "remove", "abc")
    assert outcome.exit_code == 1
    assert "2 quantized bases begin with 'abc'" in outcome.stderr
    assert len(list(quantized_folder().iterdir())) == 2


def test_models_quantize_refuses_what_quantizes_nothing(folders: dict[str, Path], run_cli: RunCli) -> None:
    outcome = run_cli("models", "quantize", str(folders["llama"]), "--quant", "none")
    assert outcome.exit_code == 1
    assert "leaves the weights as they are" in outcome.stderr


def test_the_progress_of_making_a_base_ends_at_its_total(folders: dict[str, Path]) -> None:
    told = list[tuple[int, int]]()
    choices = Choice("int8"), Choice("none")
    made = make_base(
        str(folders["llama"]), installed_plugins(), *choices, device=CPU, dtype=torch.float32,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert not made.was_there
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    wanted = wanted_base(
        open_source(folders["llama"]), open_source(folders["llama"]).fingerprint(), installed_plugins(), *choices,
        [torch.float32], CPU,
    )  # fmt: skip
    assert wanted is not None
    assert opened(wanted).folder == made.kept.folder
