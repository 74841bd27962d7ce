"""Figures: Plotly pictures of tables, in one house style."""

from thalweg.lab.figures.agreement import scatter_agreement as scatter_agreement
from thalweg.lab.figures.curves import curves as curves
from thalweg.lab.figures.density import density as density
from thalweg.lab.figures.eigenvalues import eigenvalue_intervals as eigenvalue_intervals
from thalweg.lab.figures.figure import Figure as Figure
from thalweg.lab.figures.histograms import histograms as histograms
from thalweg.lab.figures.inertia import inertia_bars as inertia_bars
from thalweg.lab.figures.levels import levels as levels
from thalweg.lab.figures.matrix import matrix as matrix
from thalweg.lab.figures.plane import plane as plane
from thalweg.lab.figures.ranking import ranking as ranking
from thalweg.lab.figures.spectrum import spectrum as spectrum

__all__ = [
    "Figure",
    "curves",
    "density",
    "eigenvalue_intervals",
    "histograms",
    "inertia_bars",
    "levels",
    "matrix",
    "plane",
    "ranking",
    "scatter_agreement",
    "spectrum",
]
