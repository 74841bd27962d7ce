"""Relaxing a convolutional network: its locality and weight sharing as values that training may leave."""

from thalweg.lifting.deviation import Deviation as Deviation
from thalweg.lifting.deviation import deviation as deviation
from thalweg.lifting.deviation import filter_image as filter_image
from thalweg.lifting.deviation import masked as masked
from thalweg.lifting.geometry import Geometry as Geometry
from thalweg.lifting.layers import LiftedLayer as LiftedLayer
from thalweg.lifting.layers import LiftPlan as LiftPlan
from thalweg.lifting.layers import lift_plan as lift_plan
from thalweg.lifting.lift import Lifted as Lifted
from thalweg.lifting.lift import lift as lift
from thalweg.lifting.lifting import Lifting as Lifting
from thalweg.lifting.local import LocallyConnected as LocallyConnected
