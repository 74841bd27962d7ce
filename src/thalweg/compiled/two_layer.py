"""two_layer: many networks f(x) = V σ(W x + b) + c, trained side by side on one core.

A few trials advance in lockstep: their whole state stays in the first cache, a row of activations is long enough
for SIMD, and one call serves them all. All arithmetic is float64. `theta` holds one trial in a row; `offsets` says
where W (hidden, inputs), b, V (outputs, hidden) and c begin in it, -1 for a bias that is not there.
"""

from typing import Any

import numpy as np

from thalweg.compiled.functions import activate, compiled, exp_of_negative

MSE, SOFTMAX_MSE, CROSS_ENTROPY = 0, 1, 2
LOSSES = {"mse": MSE, "softmax_mse": SOFTMAX_MSE, "cross_entropy": CROSS_ENTROPY}

GD, ADAM = 0, 1

RUNNING, STOPPED, DIVERGED = 0, 1, 2

_LARGEST = 1.7976931348623157e308  # of the finite numbers

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam


@compiled
def _preactivations(theta: np.ndarray, offsets: np.ndarray, x: np.ndarray, z: np.ndarray) -> None:
    """Write W x + b into z (trials, hidden, samples)."""
    inputs, size = x.shape
    for t in range(theta.shape[0]):
        for j in range(z.shape[1]):
            row = z[t, j]
            bias = theta[t, offsets[1] + j] if offsets[1] >= 0 else 0.0
            for k in range(inputs):
                w = theta[t, offsets[0] + j * inputs + k]
                feature = x[k]
                if k == 0:
                    for i in range(size):
                        row[i] = w * feature[i] + bias
                else:
                    for i in range(size):
                        row[i] += w * feature[i]


@compiled
def _outputs(theta: np.ndarray, offsets: np.ndarray, h: np.ndarray, f: np.ndarray) -> None:
    """Write V h + c into f (trials, outputs, samples)."""
    hidden, size = h.shape[1:]
    for t in range(theta.shape[0]):
        for o in range(f.shape[1]):
            out = f[t, o]
            bias = theta[t, offsets[3] + o] if offsets[3] >= 0 else 0.0
            for j in range(hidden):
                v = theta[t, offsets[2] + o * hidden + j]
                row = h[t, j]
                if j == 0:
                    for i in range(size):
                        out[i] = v * row[i] + bias
                else:
                    for i in range(size):
                        out[i] += v * row[i]


@compiled
def _squared(f: np.ndarray, y: np.ndarray, weight: np.ndarray, value: np.ndarray) -> None:
    """Add Σ weight·(f - y)² to value, and write its slope in f into f."""
    size = weight.size
    for t in range(f.shape[0]):
        for o in range(f.shape[1]):
            out, target = f[t, o], y[o]
            total = 0.0
            for i in range(size):
                e = out[i] - target[i]
                total += weight[i] * e * e
                out[i] = 2.0 * weight[i] * e
            value[t] += total


@compiled
def _softmax(f: np.ndarray, top: np.ndarray) -> None:
    """Write e^(f - max f) / Σ into f (outputs, samples), and log Σ e^f into top."""
    outputs, size = f.shape
    total = np.zeros(size)
    top[:] = f[0]
    for o in range(1, outputs):
        out = f[o]
        for i in range(size):
            top[i] = max(top[i], out[i])
    for o in range(outputs):
        out = f[o]
        for i in range(size):
            out[i] = exp_of_negative(out[i] - top[i])
            total[i] += out[i]
    for o in range(outputs):
        out = f[o]
        for i in range(size):
            out[i] /= total[i]
    for i in range(size):
        top[i] += np.log(total[i])


@compiled
def _softmax_losses(kind: int, f: np.ndarray, y: np.ndarray, weight: np.ndarray, value: np.ndarray) -> None:
    """Add the loss of softmax(f) to value, and write its slope in f into f.

    The loss of a sample is |p - y|² or -Σ y log p, with p = softmax(f).
    """
    outputs, size = y.shape
    top, along = np.empty(size), np.empty(size)
    for t in range(f.shape[0]):
        if kind == CROSS_ENTROPY:
            for o in range(outputs):
                value[t] -= (weight * y[o] * f[t, o]).sum()
        _softmax(f[t], top)
        along[:] = 0.0
        for o in range(outputs):
            out, target = f[t, o], y[o]
            total = 0.0
            for i in range(size):
                if kind == CROSS_ENTROPY:
                    along[i] += target[i]
                    total += weight[i] * target[i] * top[i]
                else:
                    along[i] += out[i] * (out[i] - target[i])
                    total += weight[i] * (out[i] - target[i]) * (out[i] - target[i])
            value[t] += total
        for o in range(outputs):
            out, target = f[t, o], y[o]
            for i in range(size):
                if kind == CROSS_ENTROPY:
                    out[i] = weight[i] * (along[i] * out[i] - target[i])
                else:
                    out[i] = 2.0 * weight[i] * out[i] * (out[i] - target[i] - along[i])


@compiled
def _outgoing_slopes(  # noqa: C901 - loops, one in the other
    theta: np.ndarray, offsets: np.ndarray, h: np.ndarray, d: np.ndarray, r: np.ndarray, gradient: np.ndarray
) -> None:
    """Write the slopes of V and c into gradient, and multiply d, σ', by Vᵀ∂R/∂f: ∂R/∂z."""
    hidden, size = h.shape[1:]
    outputs = r.shape[1]
    reach = np.empty(size)
    for t in range(theta.shape[0]):
        for j in range(hidden):
            row, back = h[t, j], d[t, j]
            for o in range(outputs):
                pull = r[t, o]
                v = theta[t, offsets[2] + o * hidden + j]
                total = 0.0
                if o == 0:
                    for i in range(size):
                        total += pull[i] * row[i]
                        reach[i] = v * pull[i]
                else:
                    for i in range(size):
                        total += pull[i] * row[i]
                        reach[i] += v * pull[i]
                gradient[t, offsets[2] + o * hidden + j] = total
            for i in range(size):
                back[i] *= reach[i]
        if offsets[3] >= 0:
            for o in range(outputs):
                pull = r[t, o]
                total = 0.0
                for i in range(size):
                    total += pull[i]
                gradient[t, offsets[3] + o] = total


@compiled
def _incoming_slopes(offsets: np.ndarray, x: np.ndarray, d: np.ndarray, gradient: np.ndarray) -> None:
    """Write the slopes of W and b into gradient, from ∂R/∂z in d."""
    inputs, size = x.shape
    for t in range(d.shape[0]):
        for j in range(d.shape[1]):
            back = d[t, j]
            for k in range(inputs):
                feature = x[k]
                total = 0.0
                for i in range(size):
                    total += back[i] * feature[i]
                gradient[t, offsets[0] + j * inputs + k] = total
            if offsets[1] >= 0:
                total = 0.0
                for i in range(size):
                    total += back[i]
                gradient[t, offsets[1] + j] = total


@compiled
def _slopes_of_one_output(
    theta: np.ndarray,
    offsets: np.ndarray,
    x: np.ndarray,
    h: np.ndarray,
    d: np.ndarray,
    r: np.ndarray,
    gradient: np.ndarray,
) -> None:
    """Do what `_outgoing_slopes` and `_incoming_slopes` do in one pass over the samples."""
    inputs, size = x.shape
    hidden = h.shape[1]
    feature = x[0]
    for t in range(theta.shape[0]):
        pull = r[t, 0]
        for j in range(hidden):
            row, back = h[t, j], d[t, j]
            v = theta[t, offsets[2] + j]
            to_v, to_w, to_b = 0.0, 0.0, 0.0
            for i in range(size):
                to_v += pull[i] * row[i]
                slope = v * pull[i] * back[i]
                back[i] = slope
                to_w += slope * feature[i]
                to_b += slope
            gradient[t, offsets[2] + j] = to_v
            gradient[t, offsets[0] + j * inputs] = to_w
            if offsets[1] >= 0:
                gradient[t, offsets[1] + j] = to_b
            for k in range(1, inputs):
                other = x[k]
                total = 0.0
                for i in range(size):
                    total += back[i] * other[i]
                gradient[t, offsets[0] + j * inputs + k] = total
        if offsets[3] >= 0:
            total = 0.0
            for i in range(size):
                total += pull[i]
            gradient[t, offsets[3]] = total


@compiled
def _gathered(source: np.ndarray, order: np.ndarray, target: np.ndarray) -> None:
    for k in range(source.shape[0]):
        for i in range(order.size):
            target[k, i] = source[k, order[i]]


@compiled
def _noted(
    theta: np.ndarray, gradient: np.ndarray, value: np.ndarray, step: int, keeps: bool, stop: float, log: Any
) -> None:
    """Keep R and the L1 norm of the gradient of every trial, and the least norm with its place; judge its status."""
    status, losses, norms, least_l1, least_loss, least_step, least_theta = log
    for t in range(theta.shape[0]):
        if status[t] != RUNNING:
            continue
        norm, size = 0.0, 0.0
        point, slope = theta[t], gradient[t]
        for p in range(point.size):
            norm += abs(slope[p])
            size += abs(point[p])
        losses[t], norms[t] = value[t], norm
        if not norm + size + abs(value[t]) <= _LARGEST:  # numba's isfinite is always true under these flags
            status[t] = DIVERGED
            continue
        if keeps and norm < least_l1[t]:
            least_l1[t], least_loss[t], least_step[t] = norm, value[t], step
            kept = least_theta[t]
            for p in range(point.size):
                kept[p] = point[p]
        if keeps and norm <= stop:
            status[t] = STOPPED


@compiled
def _moved(
    theta: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    status: np.ndarray,
    optimizer: int,
    rate: float,
    count: int,
) -> None:
    """Take one step; `count` is the number of this step, from 1."""
    stride, root = rate, 1.0
    if optimizer == ADAM:
        stride = rate / (1.0 - _BETA_1**count)
        root = np.sqrt(1.0 - _BETA_2**count)
    for t in range(theta.shape[0]):
        if status[t] != RUNNING:
            continue
        point, slope = theta[t], gradient[t]
        if optimizer == GD:
            for p in range(point.size):
                point[p] -= rate * slope[p]
            continue
        first, second = mean[t], square[t]
        for p in range(point.size):
            g = slope[p]
            first[p] += (1.0 - _BETA_1) * (g - first[p])
            second[p] = _BETA_2 * second[p] + (1.0 - _BETA_2) * g * g
            point[p] -= stride * first[p] / (np.sqrt(second[p]) / root + _EPSILON)


@compiled
def advance(  # noqa: PLR0913, PLR0917 - groups of arguments already
    point: Any, log: Any, trials: Any, net: Any, data: Any, order: np.ndarray, how: Any, span: Any, scratch: Any
) -> None:
    """Advance trials [first, last) through the steps [begin, end).

    At every step R, ∇R and its L1 norm are computed *before* the update, and the least norm met is kept with its
    place. With mini-batches (`order` not empty) they are those of the mini-batch, and the least is not kept.

    Args:
        point: (theta, mean, square), each (trials, params); the last two are Adam's.
        log: (status, losses, norms, least_l1, least_loss, least_step, least_theta), one row for each trial.
        trials: (first, last).
        net: (offsets, activation, loss).
        data: (x (inputs, samples), y (outputs, samples), weight (samples,)).
        order: samples of each mini-batch, (end - begin, batch); (0, 0) for full batches.
        how: (optimizer, learning rate, L1 norm to stop at, or -1).
        span: (begin, end, whether steps are taken).
        scratch: (z, h, d (lockstep, hidden, samples), f (lockstep, outputs, samples), gradient (lockstep, params),
            and x, y, weight of a mini-batch).
    """
    theta, mean, square = point
    offsets, activation, loss = net
    z, h, d, f, gradient, x_batch, y_batch, weight_batch = scratch
    optimizer, rate, stop = how
    begin, end, moves = span
    is_full = order.shape[0] == 0
    if is_full:
        x, y, weight = data
    else:
        x, y, weight = x_batch, y_batch, weight_batch
    flat_z, flat_h, flat_d = z.reshape(-1), h.reshape(-1), d.reshape(-1)
    value = np.empty(z.shape[0])
    for head in range(trials[0], trials[1], z.shape[0]):
        tail = min(head + z.shape[0], trials[1])
        live = tail - head
        here = theta[head:tail]
        mine = (
            log[0][head:tail], log[1][head:tail], log[2][head:tail], log[3][head:tail], log[4][head:tail],
            log[5][head:tail], log[6][head:tail],
        )  # fmt: skip
        for step in range(begin, end):
            if not is_full:
                batch = order[step - begin]
                _gathered(data[0], batch, x_batch)
                _gathered(data[1], batch, y_batch)
                for i in range(batch.size):
                    weight_batch[i] = data[2][batch[i]] * data[2].size / batch.size
            _preactivations(here, offsets, x, z)
            activate(activation, flat_z, flat_h, flat_d, live * z.shape[1] * z.shape[2])
            _outputs(here, offsets, h, f)
            value[:] = 0.0
            if loss == MSE:
                _squared(f[:live], y, weight, value)
            else:
                _softmax_losses(loss, f[:live], y, weight, value)
            if f.shape[1] == 1:
                _slopes_of_one_output(here, offsets, x, h, d, f, gradient)
            else:
                _outgoing_slopes(here, offsets, h, d, f, gradient)
                _incoming_slopes(offsets, x, d[:live], gradient)
            _noted(here, gradient, value, step, is_full, stop, mine)
            if moves:
                _moved(here, gradient, mean[head:tail], square[head:tail], mine[0], optimizer, rate, step + 1)
