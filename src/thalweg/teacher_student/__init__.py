"""Teacher and student: which student node becomes which teacher node, and why."""

from thalweg.teacher_student.chain import Chain as Chain
from thalweg.teacher_student.chain import Layer as Layer
from thalweg.teacher_student.chain import Trace as Trace
from thalweg.teacher_student.chain import chain as chain
from thalweg.teacher_student.correlation import CrossMoments as CrossMoments
from thalweg.teacher_student.correlation import best_students as best_students
from thalweg.teacher_student.correlation import correlations as correlations
from thalweg.teacher_student.correlation import mean_best as mean_best
from thalweg.teacher_student.correlation import mean_rank as mean_rank
from thalweg.teacher_student.subnetwork import subnetwork as subnetwork
