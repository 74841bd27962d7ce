"""The critical affine subspace: move the shares of an embedded point, keep their sums, and it stays critical."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.embeddings.splitting import Embedding
from thalweg.errors import PlanError
from thalweg.structure.symmetry import scaled_along
from thalweg.structure.tree import gather, groups_of, spread, unit_of


@dataclass(frozen=True)
class AffineSubspace:
    """origin + span(basis): all points have the outputs of the narrow point, all are critical if it is.

    Args:
        origin: the embedded point, shape (wide,).
        basis: one direction per added unit, shape (K, wide); ∂theta'/∂a(j) - ∂theta'/∂a(first copy).
        labels: (group, wide unit) of each direction.
    """

    origin: Float[Tensor, " wide"]
    basis: Float[Tensor, "added wide"]
    labels: tuple[tuple[str, int], ...]

    @property
    def dimension(self) -> int:
        """Rank of the basis: K, if no split unit's outgoing weights are all zero."""
        lengths = self.basis.norm(dim=1, keepdim=True)
        directions = self.basis[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
        return int(torch.linalg.matrix_rank(directions @ directions.T, hermitian=True)) if len(directions) else 0

    def point(self, shift: Float[Tensor, " added"]) -> Float[Tensor, " wide"]:
        """Move by `shift[k]` of outgoing share from the first copy to the copy `labels[k]`."""
        return self.origin + shift.to(self.origin) @ self.basis

    def sample(self, count: int, generator: torch.Generator, scale: float = 1.0) -> Float[Tensor, "count wide"]:
        """Draw points: standard normal shifts of share, times `scale`.

        Args:
            count: how many.
            generator: of the shifts.
            scale: standard deviation of a share. Default 1, our choice: of the size of a share itself.
        """
        shifts = scale * torch.randn(count, len(self.basis), generator=generator, dtype=torch.float64)
        return self.origin + shifts.to(self.origin) @ self.basis


def critical_subspace(embedding: Embedding, theta: Float[Tensor, " narrow"]) -> AffineSubspace:
    """Give the K-dimensional affine subspace through an embedded point, K the number of added copies.

    theta' is affine in the shares: along W'[·, j] = a(j)·W[·, p(j)] the outgoing weights of two copies of one
    unit trade places without changing their sum. Null units give no direction.

    Source:
        zhang2021embedding, theorem 2 (lemma 2 for several steps), with an explicit basis.

    Args:
        embedding: how the point is embedded.
        theta: the narrow point, critical or not; shape (narrow,).

    Returns:
        The subspace; its dimension is K if no split unit's outgoing weights vanish.

    Raises:
        PlanError: one weight reads two split groups at once along one axis (heads times their inner units), so
            that theta' is not affine in both shares; split one of them at a time.
        ShapeError: theta does not fit the narrow module.

    Example:
        >>> from torch import nn
        >>> from thalweg.embeddings import split_plan
        >>> from thalweg.space import Space
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = trace(net, torch.zeros(3, 1))
        >>> embedding = Embedding(view, Space.of(net), split_plan(view, {"0": 5}))
        >>> critical_subspace(embedding, Space.of(net).theta(net)).dimension
        3
    """
    _require_affine(embedding)
    parameters = embedding.space.parameters(theta)
    wide = embedding.wide_space
    rows, labels = [], []
    for name, split in embedding.plan.splits.items():
        for unit in range(split.wide):
            parent = split.parents[unit]
            first = int(np.argmax(split.parents == parent))
            if parent >= 0 and first != unit:
                move = np.zeros(split.wide)
                move[unit], move[first] = 1.0, -1.0
                row = torch.zeros(wide.num_params, dtype=theta.dtype, device=theta.device)
                for tensor, value in _outgoing(embedding, name, move, parameters):
                    row[wide.slice_of(tensor)] = value.reshape(-1)
                rows.append(row)
                labels.append((name, unit))
    basis = torch.stack(rows) if rows else torch.zeros(0, wide.num_params, dtype=theta.dtype)
    return AffineSubspace(embedding.apply(theta), basis, tuple(labels))


def _outgoing(
    embedding: Embedding, group: str, move: np.ndarray, parameters: dict[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """Outgoing weights of a group with `move` in place of its shares, zero elsewhere."""
    view, splits = embedding.view, embedding.plan.splits
    found = []
    for member in view.group(group).members:
        if member.role != "consumer" or member.tensor not in parameters:
            continue
        tensor = parameters[member.tensor]
        roles = view.members_of(member.tensor)
        for dim, tree in enumerate(view.axes[member.tensor]):
            here = [g for (d, g) in roles if d == dim and g in splits]
            if not here:
                continue
            index = torch.from_numpy(gather(tree, {g: splits[g].sources for g in here}))
            tensor = tensor.index_select(dim, index.to(tensor.device))
            if dim == member.dim:
                mine = unit_of(tree, group)[index.numpy()] >= 0
                tensor = scaled_along(tensor, dim, spread(tree, {group: move}) * mine)
            else:
                values = {g: splits[g].shares if roles[dim, g] == "consumer" else splits[g].alive for g in here}
                tensor = scaled_along(tensor, dim, spread(tree, values))
        found.append((member.tensor, tensor))
    return found


def _require_affine(embedding: Embedding) -> None:
    splits = embedding.plan.splits
    for group in embedding.view.groups:
        for member in group.members:
            if member.role == "consumer" and group.name in splits:
                along = [g for g in groups_of(embedding.view.axes[member.tensor][member.dim]) if g in splits]
                nested = _nested(embedding, member.tensor, member.dim, group.name)
                if nested:
                    raise PlanError(
                        f"Expected one split group along {member.tensor!r}, dim {member.dim}. Got {along}. "
                        "Split one of them at a time: the weights are not affine in both shares."
                    )


def _nested(embedding: Embedding, tensor: str, dim: int, group: str) -> bool:
    """Say whether positions of a group also belong to another split group (or to it twice)."""
    tree = embedding.view.axes[tensor][dim]
    mine = unit_of(tree, group) >= 0
    others = [g for g in embedding.plan.splits if g != group]
    twice = list(groups_of(tree)).count(group) > 1 and not _is_plain(tree, group)
    return twice or any(bool((mine & (unit_of(tree, g) >= 0)).any()) for g in others)


def _is_plain(tree: object, group: str) -> bool:
    """Say whether repeated occurrences of a group lie beside each other (a concatenation), not across."""
    from thalweg.structure.tree import ProductTree, SumTree

    if isinstance(tree, ProductTree):
        return sum(group in set(groups_of(p)) for p in tree.parts) <= 1 and all(
            _is_plain(p, group) for p in tree.parts
        )
    return all(_is_plain(p, group) for p in tree.parts) if isinstance(tree, SumTree) else True
