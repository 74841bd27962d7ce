"""What a point of a landscape is like: gradient, curvature, degeneracy."""

from thalweg.probes.curvature import Curvature as Curvature
from thalweg.probes.curvature import HessianOperator as HessianOperator
from thalweg.probes.curvature import Work as Work
from thalweg.probes.curvature import layers as layers
from thalweg.probes.curvature import to_scipy as to_scipy
from thalweg.probes.degeneracy import Inertia as Inertia
from thalweg.probes.degeneracy import inertia as inertia
from thalweg.probes.density import SpectralDensity as SpectralDensity
from thalweg.probes.density import spectral_density as spectral_density
from thalweg.probes.eigenpairs import Eigenpairs as Eigenpairs
from thalweg.probes.eigenpairs import eigenpairs as eigenpairs
from thalweg.probes.eigenpairs import eigenpairs_of as eigenpairs_of
from thalweg.probes.from_curvlinops import from_curvlinops as from_curvlinops
from thalweg.probes.gradient_norm import GradientNorm as GradientNorm
from thalweg.probes.gradient_norm import gradient_norm as gradient_norm
from thalweg.probes.hessian import hessian as hessian
from thalweg.probes.spectrum import Spectrum as Spectrum
from thalweg.probes.spectrum import eigen as eigen
from thalweg.probes.spectrum import spectrum as spectrum
from thalweg.probes.trace import TraceEstimate as TraceEstimate
from thalweg.probes.trace import hessian_trace as hessian_trace
from thalweg.probes.two_layer import is_two_layer as is_two_layer
from thalweg.probes.two_layer import two_layer_hessian as two_layer_hessian
