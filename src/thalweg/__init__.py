"""thalweg charts the loss landscape of a neural network.

Three nouns: theta (a point), objective (the landscape), view (what the coordinates mean); everything else is
functions of the three. Names are loaded on first use, so that `import thalweg` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thalweg.embeddings import catalogue as catalogue
    from thalweg.embeddings import critical_subspace as critical_subspace
    from thalweg.embeddings import deepen as deepen
    from thalweg.embeddings import embed as embed
    from thalweg.embeddings import reduce as reduce
    from thalweg.embeddings import trade_off as trade_off
    from thalweg.ensembles import Ensemble as Ensemble
    from thalweg.ensembles import merge as merge
    from thalweg.ensembles import output_ensemble as output_ensemble
    from thalweg.ensembles import wa_ensemble as wa_ensemble
    from thalweg.ensembles import weight_average as weight_average
    from thalweg.lifting import LocallyConnected as LocallyConnected
    from thalweg.lifting import deviation as deviation
    from thalweg.lifting import lift as lift
    from thalweg.matching.align import align as align
    from thalweg.objective import Objective as Objective
    from thalweg.paths.decomposition import layer_barriers as layer_barriers
    from thalweg.paths.methods import connect as connect
    from thalweg.paths.pair import Pair as Pair
    from thalweg.paths.panel import panel as panel
    from thalweg.paths.profile import profile as profile
    from thalweg.paths.widening import connectivity_width as connectivity_width
    from thalweg.probes.curvature import HessianOperator as HessianOperator
    from thalweg.probes.degeneracy import inertia as inertia
    from thalweg.probes.density import spectral_density as spectral_density
    from thalweg.probes.eigenpairs import eigenpairs as eigenpairs
    from thalweg.probes.examine import examine as examine
    from thalweg.probes.gradient_norm import gradient_norm as gradient_norm
    from thalweg.probes.hessian import hessian as hessian
    from thalweg.probes.spectrum import spectrum as spectrum
    from thalweg.space import Space as Space
    from thalweg.structure import View as View
    from thalweg.structure import trace as trace
    from thalweg.teacher_student.match import match as match
    from thalweg.training import fit as fit
    from thalweg.training import minimise as minimise
    from thalweg.training import polish as polish
    from thalweg.training import train as train
    from thalweg.training import train_population as train_population

_HOMES = {
    "Ensemble": "thalweg.ensembles",
    "HessianOperator": "thalweg.probes",
    "LocallyConnected": "thalweg.lifting",
    "Objective": "thalweg.objective",
    "Pair": "thalweg.paths",
    "Space": "thalweg.space",
    "View": "thalweg.structure",
    "align": "thalweg.matching",
    "catalogue": "thalweg.embeddings",
    "connect": "thalweg.paths",
    "connectivity_width": "thalweg.paths",
    "critical_subspace": "thalweg.embeddings",
    "deepen": "thalweg.embeddings",
    "deviation": "thalweg.lifting",
    "eigenpairs": "thalweg.probes",
    "embed": "thalweg.embeddings",
    "examine": "thalweg.probes",
    "fit": "thalweg.training",
    "gradient_norm": "thalweg.probes",
    "hessian": "thalweg.probes",
    "inertia": "thalweg.probes",
    "layer_barriers": "thalweg.paths",
    "lift": "thalweg.lifting",
    "match": "thalweg.teacher_student",
    "merge": "thalweg.ensembles",
    "minimise": "thalweg.training",
    "output_ensemble": "thalweg.ensembles",
    "panel": "thalweg.paths",
    "polish": "thalweg.training",
    "profile": "thalweg.paths",
    "reduce": "thalweg.embeddings",
    "spectral_density": "thalweg.probes",
    "spectrum": "thalweg.probes",
    "trace": "thalweg.structure",
    "trade_off": "thalweg.embeddings",
    "train": "thalweg.training",
    "train_population": "thalweg.training",
    "wa_ensemble": "thalweg.ensembles",
    "weight_average": "thalweg.ensembles",
}

__all__ = [
    "Ensemble",
    "HessianOperator",
    "LocallyConnected",
    "Objective",
    "Pair",
    "Space",
    "View",
    "__version__",
    "align",
    "catalogue",
    "connect",
    "connectivity_width",
    "critical_subspace",
    "deepen",
    "deviation",
    "eigenpairs",
    "embed",
    "examine",
    "fit",
    "gradient_norm",
    "hessian",
    "inertia",
    "layer_barriers",
    "lift",
    "match",
    "merge",
    "minimise",
    "output_ensemble",
    "panel",
    "polish",
    "profile",
    "reduce",
    "spectral_density",
    "spectrum",
    "trace",
    "trade_off",
    "train",
    "train_population",
    "wa_ensemble",
    "weight_average",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thalweg' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
