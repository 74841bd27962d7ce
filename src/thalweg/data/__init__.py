"""Data to chart landscapes on: bundled, made by a formula, or read from a local folder."""

from thalweg.data.augment import crop_and_flip as crop_and_flip
from thalweg.data.dataset import Dataset as Dataset
from thalweg.data.embedded import diabetes as diabetes
from thalweg.data.embedded import digits as digits
from thalweg.data.embedded import iris as iris
from thalweg.data.hub import cifar10 as cifar10
from thalweg.data.hub import cifar100 as cifar100
from thalweg.data.hub import mnist as mnist
from thalweg.data.streams import AugmentedImages as AugmentedImages
from thalweg.data.streams import FiniteSet as FiniteSet
from thalweg.data.streams import GaussianStream as GaussianStream
from thalweg.data.synthetic import gaussian as gaussian
from thalweg.data.synthetic import three_tanh as three_tanh
