"""Down the landscape: trainings of one network or many, their plateaux and their critical points."""

from thalweg.training.candidates import Candidates as Candidates
from thalweg.training.candidates import candidates as candidates
from thalweg.training.critical import CriticalPoint as CriticalPoint
from thalweg.training.critical import Plateau as Plateau
from thalweg.training.critical import polish as polish
from thalweg.training.critical import stagnation as stagnation
from thalweg.training.minibatch import Augment as Augment
from thalweg.training.minibatch import Fit as Fit
from thalweg.training.minibatch import fit as fit
from thalweg.training.newton import Minimum as Minimum
from thalweg.training.newton import minimise as minimise
from thalweg.training.polishing import CriticalPoints as CriticalPoints
from thalweg.training.polishing import polish_all as polish_all
from thalweg.training.population import PopulationRun as PopulationRun
from thalweg.training.population import train_population as train_population
from thalweg.training.reporting import Observe as Observe
from thalweg.training.schedules import Schedule as Schedule
from thalweg.training.schedules import learning_rate_factors as learning_rate_factors
from thalweg.training.shuffling import shuffled_batches as shuffled_batches
from thalweg.training.single import OptimizerFactory as OptimizerFactory
from thalweg.training.single import TrainingRun as TrainingRun
from thalweg.training.single import recording_steps as recording_steps
from thalweg.training.single import train as train
