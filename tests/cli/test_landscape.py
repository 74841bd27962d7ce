"""A user's data and loss on the command line: every form in which they come, and every fault in one line."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.cli import mydata
from tests.data.test_hub import pixels, root
from torch import nn
from torch.testing import assert_close

from thalweg.batching import joined
from thalweg.cli.landscape import Landscape, load_landscape, objective_on
from thalweg.errors import ConfigError, DataError, ThalwegError
from thalweg.probes.examine import examine

__all__ = ["pixels", "root"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work where `mydata.py` lies, and forget it after the test."""
    place = tmp_path / "user"
    place.mkdir()
    shutil.copy(mydata.__file__, place / "mydata.py")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    yield place
    sys.modules.pop("mydata", None)


def whole(landscape: Landscape, *, is_test: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs and targets, as the objective of some module sees them."""
    objective = objective_on(landscape, nn.Linear(2, 3), is_test=is_test, dtype=torch.float64)
    return joined(tuple(batch) for batch in objective.batches())


def refused(error: type[ThalwegError], data: str, **options: object) -> str:
    """Load what must be refused: one line, what was expected, what there is, what to do."""
    with pytest.raises(error) as caught:
        load_landscape(data, **options)
    message = str(caught.value)
    assert message.startswith("Expected ")
    assert ". Got " in message
    return message


@pytest.mark.parametrize(
    "name",
    ["PAIR", "LIST_PAIR", "ARRAYS", "OURS", "TENSORS", "BATCHES", "LOADER", "SHUFFLED", "Items", "made", "stream"],
)
def test_every_form_of_the_same_data_is_the_same_landscape(name):
    landscape = load_landscape(f"mydata:{name}")
    inputs, targets = whole(landscape)
    assert_close(inputs, mydata.INPUTS.double(), rtol=0, atol=0)
    assert_close(targets, mydata.LABELS, rtol=0, atol=0)
    assert landscape.loss_words == "cross_entropy (default for class labels)"
    assert landscape.test_data is None
    assert landscape.data_words.startswith("batches of" if name == "stream" else "12 samples of ")


def test_code_is_found_in_a_file_and_takes_arguments():
    landscape = load_landscape("mydata.py:made", arguments=["scale=2", "count=4"])
    assert_close(whole(landscape)[0], 2 * mydata.INPUTS[:4].double(), rtol=0, atol=0)
    assert landscape.words == "4 samples of mydata.py:made; loss: cross_entropy (default for class labels)"


def test_inputs_of_several_tensors_stay_together():
    several = load_landscape("mydata:SEVERAL_INPUTS").data.data[0]
    named = load_landscape("mydata:NAMED_INPUTS", num_samples=5).data.data[0]
    assert [tuple(part.shape) for part in several] == [(12, 2), (12, 2)]
    assert {name: tuple(part.shape) for name, part in named.items()} == {"x": (5, 2)}


def test_floating_targets_are_compared_by_their_squares():
    landscape = load_landscape("mydata:REGRESSION")
    assert isinstance(landscape.loss, nn.MSELoss)
    assert landscape.loss_words == "mse (default for floating targets)"


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "names", [("inputs", "targets"), ("x", "y"), ("x_train", "y_train"), ("inputs_train", "targets_train")]
)
def test_a_file_of_tensors_is_read_by_its_names(ending, names):
    tensors = dict(zip(names, (mydata.INPUTS, mydata.LABELS), strict=True))
    if ending == ".npz":
        np.savez("data.npz", **{n: t.numpy() for n, t in tensors.items()})
    else:
        save_file(tensors, "data.safetensors")
    landscape = load_landscape(f"data{ending}")
    assert_close(whole(landscape)[0], mydata.INPUTS.double(), rtol=0, atol=0)
    assert landscape.data_words == f"12 samples of data{ending}"


def test_a_file_with_two_splits_has_test_data():
    x, y = mydata.INPUTS.numpy(), mydata.LABELS.numpy()
    np.savez("data.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    landscape = load_landscape("data.npz", with_test=True)
    assert (landscape.data_words, landscape.test_words) == ("12 samples of data.npz", "3 samples of data.npz, test")
    assert len(whole(load_landscape("data.npz", split="test"))[1]) == 3


def test_test_data_are_those_of_the_dict_and_only_if_they_are_asked_for():
    assert load_landscape("mydata:SPLITS").test_data is None
    landscape = load_landscape("mydata:SPLITS", with_test=True)
    assert_close(whole(landscape, is_test=True)[0], mydata.INPUTS[:4].double() + 1, rtol=0, atol=0)
    assert landscape.test_words == "4 samples of mydata:SPLITS, test"
    chosen = load_landscape("mydata:SPLITS", split="test", with_test=True)
    assert (chosen.data_words, chosen.test_data) == ("4 samples of mydata:SPLITS, test", None)


def test_data_without_test_data_refuse_an_objective_on_them():
    with pytest.raises(DataError, match=r"Expected test data\. Got none\."):
        objective_on(load_landscape("iris"), nn.Linear(4, 3), is_test=True)


@pytest.mark.parametrize("name", ["PAIR", "BATCHES", "SHUFFLED", "Items", "stream", "PARTLY"])
def test_a_sample_is_drawn_with_its_seed_and_is_the_same_whatever_was_drawn_before(name):
    inputs, targets = whole(load_landscape(f"mydata:{name}", num_samples=5, seed=3))
    torch.rand(7)
    again, _ = whole(load_landscape(f"mydata:{name}", num_samples=5, seed=3))
    rows = (inputs[:, 0] / 2).long()
    assert len(rows) == len(set(rows.tolist())) == 5
    assert_close(targets, mydata.LABELS[rows], rtol=0, atol=0)
    if name != "PARTLY":  # in whatever order the user draws them
        assert_close(inputs, again, rtol=0, atol=0)
        assert rows.tolist() == sorted(rows.tolist())


def test_another_seed_draws_another_sample():
    samples = [whole(load_landscape("iris", num_samples=20, seed=seed))[0] for seed in (0, 1)]
    assert not torch.equal(*samples)


def test_a_sample_is_stated_in_words_and_taken_of_the_test_data_too():
    landscape = load_landscape("mydata:SPLITS", num_samples=5, seed=3, with_test=True)
    assert landscape.data_words == "5 of the 12 samples of mydata:SPLITS, train, drawn at random with seed 3"
    assert landscape.test_words == "4 samples of mydata:SPLITS, test"
    smaller = load_landscape("mydata:SPLITS", num_samples=2, with_test=True)
    assert smaller.test_words == "2 of the 4 samples of mydata:SPLITS, test, drawn at random with seed 0"


def test_a_sample_of_all_is_all():
    assert load_landscape("mydata:PAIR", num_samples=12).data_words == "12 samples of mydata:PAIR"


def test_several_targets_for_each_sample_can_be_drawn():
    landscape = load_landscape("mydata:TWO_TARGETS", num_samples=7, batch_size=None, loss="mydata:own_loss")
    assert sum(len(targets["a"]) for _, targets in landscape.data.data) == 7


@pytest.mark.parametrize(("name", "sizes"), [("PAIR", [7, 5]), ("LOADER", [7, 5]), ("Items", [7, 5])])
def test_the_batch_size_is_that_of_the_option(name, sizes):
    objective = objective_on(load_landscape(f"mydata:{name}", batch_size=7), nn.Linear(2, 3))
    assert [len(targets) for _, targets in objective.batches()] == sizes


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("iris", 150, "150 samples of iris (scikit-learn's iris, each feature with mean 0 and variance 1)"),
        ("digits", 1797, "1,797 samples of digits (scikit-learn's digits, grey levels / 16)"),
        (
            "diabetes",
            442,
            "442 samples of diabetes (scikit-learn's diabetes, each column with mean 0 and variance 1)",
        ),
    ],
)
def test_a_set_of_thalweg_is_loaded_by_its_name(name, count, words):
    landscape = load_landscape(name, with_test=True)
    assert (landscape.data.num_samples, landscape.data_words, landscape.test_data) == (count, words, None)


def test_a_set_takes_arguments():
    assert "centimetres" in load_landscape("iris", arguments=["standardize=false"]).data_words


def test_images_are_found_by_name_below_the_root_with_their_test_split(root):
    landscape = load_landscape("mnist", data_root=root, arguments=["num_samples=4", "image_size=7"])
    assert landscape.data_words.startswith("4 samples of mnist-train (ylecun/mnist, train, first 4, values in [0, 1]")
    assert landscape.data.data[0].shape == (4, 1, 7, 7)
    assert load_landscape("cifar10", data_root=root, split="test").data.num_samples == 1


def test_a_test_split_may_have_fewer_than_the_first_so_many(root):
    for file in (root / "cifar10" / "plain_text").iterdir():
        shutil.copy(file, file.with_name(file.name.replace("test", "train")))
    landscape = load_landscape("cifar10", data_root=root, arguments=["num_samples=1"], with_test=True)
    assert (landscape.data.num_samples, landscape.test_data.num_samples) == (1, 1)


@pytest.mark.parametrize("below", ["mnist", "mnist/mnist"])
def test_a_folder_of_a_known_set_is_recognised_at_every_depth(root, below, monkeypatch):
    assert load_landscape(str(root / below)).data.num_samples == 6
    monkeypatch.chdir(root / below)
    assert load_landscape(".").data.num_samples == 6


def test_a_root_with_one_set_is_that_set_and_with_two_it_is_asked_which(root):
    message = refused(ConfigError, str(root))
    assert f"Got {root}, which holds mnist and cifar10. Write --data {root / 'mnist'}." in message
    shutil.rmtree(root / "cifar10")
    assert load_landscape(str(root)).data.num_samples == 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cross_entropy", nn.CrossEntropyLoss),
        ("nll", nn.NLLLoss),
        ("mse", nn.MSELoss),
        ("l1", nn.L1Loss),
        ("huber", nn.HuberLoss),
        ("smooth_l1", nn.SmoothL1Loss),
        ("bce", nn.BCELoss),
        ("bce_with_logits", nn.BCEWithLogitsLoss),
        ("mydata:Focal", mydata.Focal),
    ],
)
def test_a_loss_is_found_by_its_name(name, kind):
    landscape = load_landscape("mydata:PAIR", loss=name)
    assert type(landscape.loss).__name__ == kind.__name__
    assert landscape.loss_words == name


@pytest.mark.parametrize("name", ["mydata:own_loss", "mydata:SMOOTH", "torch.nn.functional:cross_entropy"])
def test_a_function_is_a_loss(name):
    objective = objective_on(load_landscape("mydata:PAIR", loss=name), nn.Linear(2, 3))
    assert examine(objective, objective.theta()).num_samples == 12


def test_zeros_and_ones_are_numbers_to_a_loss_that_compares_numbers():
    objective = objective_on(load_landscape("mydata:BITS", loss="bce_with_logits"), nn.Linear(2, 1))
    assert examine(objective, objective.theta()).num_samples == 12


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ("iriss", ConfigError, "Did you mean 'iris'?"),
        ("gaussian", ConfigError, "Expected one of the sets cifar10, cifar100, diabetes, digits, iris, mnist"),
        ("mydata", ConfigError, "Got 'mydata'."),
        ("nowhere/data", DataError, "Got 'nowhere/data', which is not there."),
        ("missing.npz", DataError, "Got missing.npz, which is not there."),
        ("missing.safetensors", DataError, "Got missing.safetensors, which is not there."),
        ("mydata.py", ConfigError, "Expected data in a .npz or .safetensors file. Got mydata.py."),
        (".", DataError, "Got ., which holds none of them."),
        ("mnist", DataError, "Pass --data-root or set THALWEG_DATA."),
        ("mydat:PAIR", ConfigError, "No module named 'mydat'"),
        ("mydata:PIAR", ConfigError, "Did you mean 'PAIR'?"),
        ("mydata:no_disk", ConfigError, "FileNotFoundError: no disk"),
        ("mydata:NUMBER", DataError, "Got a int."),
        ("mydata:INPUTS", DataError, "Got a Tensor."),
        ("mydata:TWO_PAIRS", DataError, "a dict of them by train and test. Got a tuple."),
        ("mydata:OTHER_NAMES", ConfigError, "Got training."),
        ("mydata:once", DataError, "Got a generator."),
        ("mydata:EMPTY", DataError, "Expected at least one sample. Got none of mydata:EMPTY."),
        ("mydata:NO_BATCHES", DataError, "Expected at least one batch. Got none of mydata:NO_BATCHES."),
        ("mydata:TRIPLES", DataError, "Got 3 parts."),
        ("mydata:BY_NAME", DataError, "Got a dict."),
        ("mydata:TEXTS", DataError, "Got the type <U1."),
        ("mydata:UNEQUAL", DataError, "Got 12 and 5."),
        ("mydata:WEIGHTED", DataError, "Got a WeightedRandomSampler"),
        ("mydata:REPLACED", DataError, "Got a RandomSampler"),
        ("mydata:torn", DataError, "Got OSError: image."),
        ("mydata:BITS", ConfigError, "for targets that are no labels and no numbers. Got torch.bool."),
        ("mydata:TWO_TARGETS", ConfigError, "Got a dict. Name the loss."),
    ],
)
def test_data_that_are_none_are_refused(data, error, words):
    assert words in refused(error, data)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("mydata:PAIR", {"arguments": ["scale=2"]}, "Expected a function for --data-arg."),
        ("mydata:made", {"arguments": ["scale"]}, "Expected --data-arg key=value. Got 'scale'."),
        ("mydata:made", {"arguments": ["size=2"]}, "Give its arguments with --data-arg"),
        ("iris", {"arguments": ["standardise=false"]}, "Did you mean 'standardize'?"),
        ("iris", {"arguments": ["dtype=float32"]}, "Got 'dtype'."),
        ("mnist", {"arguments": ["split=test"]}, "Use --split."),
        ("iris", {"split": "validation"}, "Expected --split train or test. Got 'validation'."),
        ("iris", {"split": "test"}, "Got iris, which has no test."),
        ("mydata:PAIR", {"split": "test"}, "which has no test."),
        ("mydata:PAIR", {"num_samples": 13}, "Expected --samples of at most 12. Got 13."),
        ("mydata:BATCHES", {"batch_size": 4}, "Expected no --batch-size with mydata:BATCHES."),
        ("mydata:PAIR", {"loss": "cross_entropie"}, "Did you mean 'cross_entropy'?"),
        ("mydata:PAIR", {"loss": "mydata:NUMBER"}, "Got one of type int."),
        ("mydata:PAIR", {"loss": "mydata:of_three"}, "to take (outputs, targets). Got missing a required argument"),
        ("mydata:PAIR", {"loss": "mydata:NeedsGamma"}, "to be built without arguments."),
    ],
)
def test_options_that_do_not_fit_are_refused(data, options, words):
    assert words in refused(ConfigError, data, **options)


def test_a_sample_larger_than_a_stream_is_refused():
    assert "Expected between 1 and 12 samples. Got 13." in refused(DataError, "mydata:stream", num_samples=13)


def test_random_augmentation_is_found():
    message = refused(DataError, "mydata:Items", arguments=["noise=0.1"])
    assert "Got other numbers in the first batch when it was read again." in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not an archive"])
@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_damaged_file_is_refused(content, ending):
    Path(f"data{ending}").write_bytes(content)
    assert f"Expected a whole {ending} file of numbers. Got data{ending}: " in refused(DataError, f"data{ending}")


def test_a_file_whose_arrays_need_code_is_refused_without_running_it():
    np.savez("data.npz", x=np.array([Runs()], dtype=object), y=np.zeros(1))
    assert "Expected a whole .npz file of numbers." in refused(DataError, "data.npz")
    assert not Path("ran").exists()


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_file_without_the_names_says_which_it_has():
    np.savez("data.npz", features=np.zeros(3), labels=np.zeros(3))
    assert "Got features, labels. Save them under these names." in refused(DataError, "data.npz")


def test_a_file_takes_no_arguments():
    np.savez("data.npz", x=np.zeros(3), y=np.zeros(3))
    assert "Expected no --data-arg with a file." in refused(ConfigError, "data.npz", arguments=["a=1"])
