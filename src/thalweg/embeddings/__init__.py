"""Carry a point exactly into a wider network, and bring it back."""

from thalweg.embeddings.affine import AffineSubspace as AffineSubspace
from thalweg.embeddings.affine import critical_subspace as critical_subspace
from thalweg.embeddings.checked import Embedded as Embedded
from thalweg.embeddings.checked import Reduced as Reduced
from thalweg.embeddings.checked import embed as embed
from thalweg.embeddings.checked import reduce as reduce
from thalweg.embeddings.plan import Plan as Plan
from thalweg.embeddings.plan import Split as Split
from thalweg.embeddings.plan import one_step as one_step
from thalweg.embeddings.plan import split_plan as split_plan
from thalweg.embeddings.reduction import Merge as Merge
from thalweg.embeddings.reduction import Reduction as Reduction
from thalweg.embeddings.reduction import find_merges as find_merges
from thalweg.embeddings.reduction import similarity_matrix as similarity_matrix
from thalweg.embeddings.splitting import Embedding as Embedding
