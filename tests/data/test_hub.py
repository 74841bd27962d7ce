"""Real images come out of the parquet layout as they went in, once decoded, from the cache."""

import io
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from thalweg.data import cifar10, cifar100, mnist
from thalweg.data import hub as hub_module
from thalweg.errors import DataError

COUNT = 6


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 28, 28), dtype=np.uint8)


def encoded(array: np.ndarray) -> dict[str, object]:
    stream = io.BytesIO()
    import_module("PIL.Image").fromarray(array).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture
def root(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of the hub, its MNIST in two shards, and a cache beside it."""
    polars = pytest.importorskip("polars")
    pytest.importorskip("PIL.Image")
    monkeypatch.setenv("THALWEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("THALWEG_DATA", raising=False)

    folder = tmp_path / "data" / "mnist" / "mnist"
    folder.mkdir(parents=True)
    for shard, rows in enumerate((slice(0, 4), slice(4, COUNT))):
        table = polars.DataFrame(
            {"image": [encoded(p) for p in pixels[rows]], "label": list(range(COUNT))[rows]},
        )
        table.write_parquet(folder / f"train-{shard:05d}-of-00002.parquet")
    folder = tmp_path / "data" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    colours = np.stack([pixels[0], pixels[1], pixels[2]], axis=-1)
    polars.DataFrame({"img": [encoded(colours)], "label": [7]}).write_parquet(folder / "test-00000-of-00001.parquet")
    return tmp_path / "data"


def test_images_and_labels_come_back_over_all_shards(root: Path, pixels: np.ndarray) -> None:
    data = mnist(data_root=root, dtype=torch.float64)
    assert_close(data.inputs * 255, torch.from_numpy(pixels).double().unsqueeze(1), rtol=1e-12, atol=1e-12)
    assert data.targets.tolist() == list(range(COUNT))
    assert data.inputs.shape == (COUNT, 1, 28, 28)


def test_colours_stand_before_rows_and_columns(root: Path, pixels: np.ndarray) -> None:
    data = cifar10("test", data_root=root)
    assert_close(data.inputs[0] * 255, torch.from_numpy(pixels[:3]).float())
    assert data.targets.tolist() == [7]


@pytest.fixture
def root_100(root: Path, pixels: np.ndarray) -> Path:
    """The folder of `root` with CIFAR-100 in it."""
    folder = root / "cifar100" / "cifar100"
    folder.mkdir(parents=True)
    colours = np.stack([pixels[0], pixels[1], pixels[2]], axis=-1)
    images = {"img": [encoded(colours), encoded(colours[::-1])], "fine_label": [99, 41], "coarse_label": [3, 8]}
    import_module("polars").DataFrame(images).write_parquet(folder / "train-00000-of-00001.parquet")
    return root


def test_the_fine_classes_of_cifar_100_are_its_labels(root_100: Path, pixels: np.ndarray) -> None:
    data = cifar100(data_root=root_100, dtype=torch.float64)
    expected = torch.from_numpy(pixels[:3]).double() / 255
    assert_close(data.inputs, torch.stack([expected, expected.flip(1)]), rtol=1e-12, atol=1e-12)
    assert (data.targets.tolist(), data.num_classes, data.name) == ([99, 41], 100, "cifar100-train")
    means, stds = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)))
    normalized = cifar100(data_root=root_100, normalize=True, num_samples=1)
    assert_close(normalized.inputs[0], (expected.float() - means) / stds)
    with pytest.raises(DataError, match=r"cifar100/test-\*-of-00001.* Got 0\. Copy the files of uoft-cs/cifar100"):
        cifar100("test", data_root=root_100)


def test_sets_are_found_by_their_folders(root_100: Path) -> None:
    found = dict.fromkeys(("mnist", "cifar10", "cifar100"), root_100)
    assert hub_module.known_sets(root_100) == found
    for folder in (root_100 / "cifar100", root_100 / "cifar100" / "cifar100"):
        assert hub_module.known_sets(folder) == {"cifar100": root_100}


def test_the_second_reading_needs_the_cache_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mnist(data_root=root)
    monkeypatch.setitem(sys.modules, "polars", None)
    assert_close(mnist(data_root=root).inputs, first.inputs, rtol=0, atol=0)


def test_a_changed_file_is_decoded_anew(root: Path) -> None:
    mnist(data_root=root)
    folder = root / "mnist" / "mnist"
    (folder / "train-00000-of-00002.parquet").write_bytes((folder / "train-00001-of-00002.parquet").read_bytes())
    assert mnist(data_root=root).targets.tolist() == [4, 5, 4, 5]


def test_a_damaged_cache_is_decoded_anew(root: Path, tmp_path: Path) -> None:
    first = mnist(data_root=root)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"rubbish")
    assert_close(mnist(data_root=root).inputs, first.inputs, rtol=0, atol=0)


def test_shrinking_averages_areas(root: Path, pixels: np.ndarray) -> None:
    data = mnist(data_root=root, image_size=14, num_samples=2, dtype=torch.float64)
    blocks = torch.from_numpy(pixels[:2]).double().reshape(2, 14, 2, 14, 2).mean(dim=(2, 4)) / 255
    assert_close(data.inputs.squeeze(1), blocks)
    assert "shrunk to 14×14" in data.source


def test_normalising_applies_the_published_statistics(root: Path) -> None:
    plain = mnist(data_root=root).inputs
    assert_close(mnist(data_root=root, normalize=True).inputs, (plain - 0.1307) / 0.3081)


def test_the_environment_names_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_DATA", str(root))
    assert len(mnist(num_samples=3)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 7}, r"Expected between 1 and 6 samples of mnist-train\. Got 7"),
        ({"num_samples": 0}, r"Got 0\. Ask for another number"),
        ({"image_size": 29}, r"Expected an image size between 1 and 28 for mnist-train\. Got 29"),
    ],
)
def test_impossible_requests_are_refused(root: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mnist(data_root=root, **options)


def test_no_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    with pytest.raises(DataError, match=r"Pass --data-root or set THALWEG_DATA"):
        mnist()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mnist/train-\*-of-00001\.parquet\. Got 0\. Copy the files of ylecun/mnist"):
        mnist(data_root=tmp_path)


def test_a_missing_shard_is_noticed(root: Path) -> None:
    (root / "mnist" / "mnist" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"Expected 2 file\(s\).*Got 1"):
        mnist(data_root=root)


def test_a_damaged_file_is_named(root: Path) -> None:
    file = root / "mnist" / "mnist" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"Expected a parquet file of encoded images.*train-00001"):
        mnist(data_root=root)


def test_a_cache_that_cannot_be_written_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match="Expected a cache folder that can be written"):
        mnist(data_root=root, cache=tmp_path / "taken")


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist" / "mnist").mkdir(parents=True)
    (tmp_path / "mnist" / "mnist" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(DataError, match=r"pip install 'thalweg\[tables\]'"):
        mnist(data_root=tmp_path, cache=tmp_path / "cache")


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THALWEG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert hub_module._cache_folder(None) == Path("/somewhere/thalweg")
