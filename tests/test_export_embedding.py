"""The exported embedding graphs against the table itself, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lavintk.errors import ModelError
from lavintk_onnx.embedding import write_embedding_graphs
from lavintk_onnx.grids import EncodedWeight, Grid, decode, encode, quantizer_for

VOCABULARY, HIDDEN = 301, 96
IMAGE_ID = VOCABULARY + 2
TABLE = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
IDS = np.array([[0, 7, 300, 5], [299, 1, 7, 150]])
GRIDS: tuple[Grid, ...] = ("fp32", "fp16", "int8", "int4")


def encoded(grid: Grid, table: Tensor = TABLE) -> EncodedWeight:
    return encode(table, grid, quantizer_for(grid))


def write(folder: Path, table: EncodedWeight) -> tuple[Path, Path]:
    paths = folder / "embed_tokens.onnx", folder / "embedding.onnx"
    write_embedding_graphs(table, *paths, image_id=IMAGE_ID)
    return paths


def run(path: Path, **inputs: NDArray[np.generic]) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embedded,) = session.run(["inputs_embeds"], inputs)
    return torch.from_numpy(embedded)


def features(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, HIDDEN), dtype=np.float32)


def with_placeholders(*places: tuple[int, int]) -> NDArray[np.int64]:
    ids = IDS.copy()
    for place in places:
        ids[place] = IMAGE_ID
    return ids


@pytest.mark.parametrize("grid", GRIDS)
def test_both_graphs_give_the_tables_rows(grid: Grid, tmp_path: Path) -> None:
    table = encoded(grid)
    wanted = decode(table)[torch.from_numpy(IDS)]
    embed_tokens, embedding = write(tmp_path, table)
    tolerance = 1e-6 if grid in ("int8", "int4") else 0.0
    torch.testing.assert_close(run(embed_tokens, input_ids=IDS), wanted, atol=tolerance, rtol=0)
    found = run(embedding, input_ids=IDS, image_features=features(0))
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_features_take_the_places_of_the_placeholders_in_order(grid: Grid, tmp_path: Path) -> None:
    table = encoded(grid)
    _, embedding = write(tmp_path, table)
    ids = with_placeholders((0, 1), (0, 2), (1, 3))
    wanted = decode(table)[torch.from_numpy(IDS)]
    wanted[0, 1], wanted[0, 2], wanted[1, 3] = torch.from_numpy(features(3))
    found = run(embedding, input_ids=ids, image_features=features(3))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_placeholder_that_is_overwritten_later_gives_row_zero(grid: Grid, tmp_path: Path) -> None:
    embed_tokens, _ = write(tmp_path, encoded(grid))
    found = run(embed_tokens, input_ids=with_placeholders((0, 3)))
    assert torch.equal(found[0, 3], found[0, 0])
    assert torch.equal(found[1], run(embed_tokens, input_ids=IDS)[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_features_than_placeholders_is_an_error(count: int, tmp_path: Path) -> None:
    _, embedding = write(tmp_path, encoded("fp32"))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(embedding, input_ids=with_placeholders((0, 1), (1, 1)), image_features=features(count))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_table_lies_once_in_the_data_file_of_both(grid: Grid, tmp_path: Path) -> None:
    table = encoded(grid)
    paths = write(tmp_path, table)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "embed_tokens.onnx",
        "embed_tokens.onnx_data",
        "embedding.onnx",
    ]
    assert (tmp_path / "embed_tokens.onnx_data").stat().st_size - table.nbytes in range(3 * 64)
    for path in paths:
        assert path.stat().st_size < 3000
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        files = {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
        assert files == {"embed_tokens.onnx_data"}


@pytest.mark.parametrize("grid", ["int8", "int4"])
def test_a_width_that_does_not_fill_its_last_block_is_cut_to_size(grid: Grid, tmp_path: Path) -> None:
    table = encoded(grid, TABLE[:, :72].contiguous())
    embed_tokens, _ = write(tmp_path, table)
    found = run(embed_tokens, input_ids=IDS)
    torch.testing.assert_close(found, decode(table)[torch.from_numpy(IDS)], atol=1e-6, rtol=0)


def test_a_placeholder_that_could_be_sampled_is_refused(tmp_path: Path) -> None:
    paths = tmp_path / "embed_tokens.onnx", tmp_path / "embedding.onnx"
    with pytest.raises(ModelError, match="has id 300, a row of the vocabulary of 301"):
        write_embedding_graphs(encoded("fp32"), *paths, image_id=300)


def test_a_grid_that_nothing_gathers_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be stored on the grid nf4 with blocks of 64"):
        write(tmp_path, EncodedWeight("nf4", (VOCABULARY, HIDDEN), {}, 64))
