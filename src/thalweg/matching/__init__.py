"""Who meets whom, and the next layer by least squares."""

from thalweg.matching.align import Alignment as Alignment
from thalweg.matching.align import align as align
from thalweg.matching.gram import Gram as Gram
from thalweg.matching.gram import Solution as Solution
from thalweg.matching.rebasin import Rebasin as Rebasin
from thalweg.matching.rebasin import straight_through as straight_through
from thalweg.matching.refit import Fit as Fit
from thalweg.matching.refit import refit as refit
from thalweg.matching.transport import Assignment as Assignment
from thalweg.matching.transport import assign as assign
from thalweg.matching.transport import transport as transport
from thalweg.matching.units import unit_rows as unit_rows
from thalweg.matching.units import with_unit_rows as with_unit_rows
