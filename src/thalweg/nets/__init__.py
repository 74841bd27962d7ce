"""Networks to study: plain modules whose every width is an argument, so that a wider one is built alike."""

from thalweg.nets.activation import Activation as Activation
from thalweg.nets.activation import activation_module as activation_module
from thalweg.nets.alexnet import alexnet as alexnet
from thalweg.nets.cnn import CNN as CNN
from thalweg.nets.cnn import LeNet as LeNet
from thalweg.nets.cnn import conv2fc1 as conv2fc1
from thalweg.nets.initial import default_init_ as default_init_
from thalweg.nets.initial import gaussian_init_ as gaussian_init_
from thalweg.nets.mlp import MLP as MLP
from thalweg.nets.mlp import two_layer as two_layer
from thalweg.nets.resnet import ResNet as ResNet
from thalweg.nets.resnet import resnet20 as resnet20
from thalweg.nets.teacher_student import NormPlace as NormPlace
from thalweg.nets.teacher_student import relu_cnn as relu_cnn
from thalweg.nets.teacher_student import relu_mlp as relu_mlp
from thalweg.nets.teacher_student import teacher_init_ as teacher_init_
from thalweg.nets.teacher_student import widened as widened
from thalweg.nets.transformer import GPT as GPT
from thalweg.nets.transformer import BlockWidths as BlockWidths
from thalweg.nets.transformer import EncoderClassifier as EncoderClassifier
from thalweg.nets.vanilla_cnn import vanilla_cnn as vanilla_cnn
from thalweg.nets.vgg import VGG as VGG
from thalweg.nets.vgg import vgg16 as vgg16
