"""What a point of a landscape is like: gradient, curvature, degeneracy."""

from thalweg.probes.degeneracy import Inertia as Inertia
from thalweg.probes.degeneracy import inertia as inertia
from thalweg.probes.gradient_norm import GradientNorm as GradientNorm
from thalweg.probes.gradient_norm import gradient_norm as gradient_norm
from thalweg.probes.hessian import hessian as hessian
from thalweg.probes.spectrum import Spectrum as Spectrum
from thalweg.probes.spectrum import eigen as eigen
from thalweg.probes.spectrum import spectrum as spectrum
from thalweg.probes.two_layer import is_two_layer as is_two_layer
from thalweg.probes.two_layer import two_layer_hessian as two_layer_hessian
