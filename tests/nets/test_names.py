"""What the room offers can be found by name."""

import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        *("MLP", "two_layer", "CNN", "LeNet", "conv2fc1", "VGG", "vgg16"),
        *("ResNet", "resnet20", "EncoderClassifier", "GPT", "vanilla_cnn", "alexnet"),
    ],
)
def test_every_net_resolves_in_the_room(name: str) -> None:
    assert callable(getattr(importlib.import_module("thalweg.nets"), name))
