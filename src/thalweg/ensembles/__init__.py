"""Several trained networks as one predictor, or as one network."""

from thalweg.ensembles.adjusted import wa_ensemble as wa_ensemble
from thalweg.ensembles.ensemble import Ensemble as Ensemble
from thalweg.ensembles.ensemble import output_ensemble as output_ensemble
from thalweg.ensembles.ensemble import single as single
from thalweg.ensembles.ensemble import weight_average as weight_average
from thalweg.ensembles.merging import Merged as Merged
from thalweg.ensembles.merging import merge as merge
from thalweg.ensembles.scores import EnsembleScore as EnsembleScore
from thalweg.ensembles.scores import evaluate as evaluate
from thalweg.ensembles.scores import growth as growth
