"""Loops over tokens, for rules that read their own past output: no form of them is parallel in time.

Only what hangs on the past output is in a loop; the caller projects the operands of all tokens before. Gradients are
written by hand, because autograd would keep every matrix of every token: the backward loop begins with the last matrix
and takes the writes out again one by one, so that memory grows with T d, not with T d^2. Differentiable once.

Products are written as row times matrix, and the backward loops keep the transposed matrix for that: matrix times
column takes several times as long in torch's batched product on a CPU.
"""

from dataclasses import dataclass
from typing import Callable, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import no_autocast

Scan = Callable[..., Tuple[Tensor, Tensor]]  # the delta rule: q, k, v, beta, state -> out, state


class RnnCell:
    """h_t = p_t."""

    @staticmethod
    def forward(p: Tensor, c: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """p (N, 1, d) -> h (N, d), the cell c that it does not have, and what ``backward`` needs."""
        return p[:, 0], c, p[:0]

    @staticmethod
    def backward(dh: Tensor, dc: Tensor, c: Tensor, kept: Tensor) -> Tuple[Tensor, Tensor]:
        """Gradients of p and of the cell before, which is ``c``, from those of h and of the cell after."""
        return dh[:, None], dc


class LstmCell:
    """c_t = i u + (1 - i) c_{t-1}, h_t = o c_t with p = (i, u, o), where i and o go through a sigmoid."""

    @staticmethod
    def forward(p: Tensor, c: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """p (N, 3, d), c (N, d) -> h (N, d), c, and what ``backward`` needs."""
        i, u, o = p[:, 0].sigmoid(), p[:, 1], p[:, 2].sigmoid()
        c = i * u + (1 - i) * c
        return o * c, c, torch.stack([i, u, o], dim=1)

    @staticmethod
    def backward(dh: Tensor, dc: Tensor, c: Tensor, kept: Tensor) -> Tuple[Tensor, Tensor]:
        """Gradients of p and of the cell before, which is ``c``, from those of h and of the cell after."""
        i, u, o = kept.unbind(1)
        after = i * u + (1 - i) * c
        dc = dc + dh * o
        di, do = dc * (u - c), dh * after
        return torch.stack([di * i * (1 - i), dc * i, do * o * (1 - o)], dim=1), dc * (1 - i)


def recurrent_reads(
    cell: type,
    z: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    h: Tensor,
    c: Tensor,
    padding: Optional[Tensor],
    delta: Scan,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """p_t = z_t + R_t^T softmax(h_{t-1});  h_t, c_t = cell(p_t, c_{t-1}), with R_t written by the delta rule.

    Args:
        cell: ``RnnCell`` or ``LstmCell``; G = 1 or 3 matrices R and parts of p for each head.
        z, k, v: (B, H, G, T, d). k is zero at padding, for which R stays as it is.
        beta: (B, H, G, T).
        state, h, c: R (B, H, G, d, d), h and c (B, H, d) before the first token. RnnCell hands c through.
        padding: (B, 1, T), true where h and c stay as they are; or None.
        delta: the scan of the delta rule, with the gradients that need no loop.

    Returns:
        h after every token (B, H, T, d), and R, h and c after the last.
    """
    operands = (z, k, v, beta, state, h, c)
    with torch.no_grad(), no_autocast(z.device.type):
        loop = _read_loop(cell, *operands, padding)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in operands)):
        return loop.outputs(h.shape)
    # The same reads once more, all at once, now that the queries are known. The backward loop turns the gradients of
    # h into those of p; what follows from them is the scan's to work out.
    groups = z.shape[2]
    q = loop.softmaxed[:, :, None].expand(-1, -1, groups, -1).movedim(0, 2)  # (N, G, T, d)
    q = q.reshape(*z.shape[:2], *q.shape[1:])
    read, state_end = delta(*(x.flatten(1, 2) for x in (q, k, v, beta, state)))
    out, h_end, c_end = _ReadLoop.apply(z + read.view_as(z), h, c, loop)
    return out, state_end.view_as(state), h_end, c_end


@dataclass
class _Reads:
    """What the loop found, tokens first: N = B H rows, or N G of them where every matrix has its own."""

    cell: type
    k: Tensor  # (T, N G, 1, d)
    inserted: List[Tensor]  # T of (N G, 1, d)
    real: Optional[Tensor]  # (T, N, 1)
    softmaxed: Tensor  # (T, N, d), of h before each token
    cells: List[Tensor]  # T of (N, d), c before each token
    kept: List[Tensor]  # T of what the cell keeps
    h: Tensor  # (T, N, d) after each token
    end: Tuple[Tensor, Tensor, Tensor]  # R (B, H, G, d, d), h and c (N, d) after the last

    def outputs(self, shape: torch.Size) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``recurrent_reads`` returns them; ``shape`` is (B, H, d)."""
        (state, h, c), tokens = self.end, len(self.h)
        out = self.h.movedim(0, 1).reshape(*shape[:2], tokens, shape[2])
        return out, state, h.view(shape), c.view(shape)


def _read_loop(cell, z, k, v, beta, state, h, c, padding) -> _Reads:
    heads, groups, tokens, width = z.shape[1:]
    rows = z.shape[0] * heads
    z = z.movedim(3, 0).reshape(tokens, rows, groups, width)
    k, v = (x.movedim(3, 0).reshape(tokens, rows * groups, 1, width) for x in (k, v))
    beta = beta.movedim(3, 0).reshape(tokens, rows * groups, 1, 1)
    real = _real(padding, heads)
    matrices, state = state.shape, state.reshape(rows * groups, width, width).clone()
    h, c = h.reshape(rows, width), c.reshape(rows, width)
    softmaxed, after = (z.new_empty(tokens, rows, width) for _ in range(2))
    inserted, cells, kept = [], [], []
    for t in range(tokens):
        insert = beta[t] * torch.baddbmm(v[t], k[t], state, alpha=-1)
        state.addcmul_(k[t].mT, insert)
        torch.softmax(h, -1, out=softmaxed[t])
        query = softmaxed[t][:, None].expand(-1, groups, -1).reshape(rows * groups, 1, width)
        p = torch.baddbmm(z[t].reshape(rows * groups, 1, width), query, state).view(rows, groups, width)
        new_h, new_c, keep = cell.forward(p, c)
        inserted.append(insert)
        cells.append(c)
        kept.append(keep)
        h = new_h if real is None else torch.where(real[t], new_h, h)
        c = new_c if real is None else torch.where(real[t], new_c, c)
        after[t] = h
    return _Reads(cell, k, inserted, real, softmaxed, cells, kept, after, (state.view(matrices), h, c))


def _real(padding: Optional[Tensor], heads: int) -> Optional[Tensor]:
    """padding (B, 1, T) -> (T, B H, 1), true at the tokens that count."""
    return None if padding is None else ~padding.expand(-1, heads, -1).flatten(0, 1).T[..., None]


class _ReadLoop(torch.autograd.Function):
    """h from p, which the loop has found already; backward is the loop in reverse."""

    @staticmethod
    def forward(ctx, p: Tensor, h: Tensor, c: Tensor, loop: _Reads):
        ctx.loop, ctx.groups = loop, p.shape[2]
        out, _, h_end, c_end = loop.outputs(h.shape)
        return out, h_end.clone(), c_end.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_h_end: Tensor, d_c_end: Tensor):
        with no_autocast(d_out.device.type):
            dp, dh, dc = _read_loop_backward(ctx.loop, d_out, d_h_end, d_c_end, ctx.groups)
        return dp, dh, dc, None


def _read_loop_backward(loop: _Reads, d_out: Tensor, dh: Tensor, dc: Tensor, groups: int):
    shape, tokens = dh.shape, d_out.shape[2]
    rows, width = shape[0] * shape[1], shape[2]
    d_out = d_out.movedim(2, 0).reshape(tokens, rows, width)
    dh, dc = dh.reshape(rows, width), dc.reshape(rows, width)
    state = loop.end[0].reshape(rows * groups, width, width).mT.contiguous()
    dps = d_out.new_empty(tokens, rows, groups, width)
    for t in reversed(range(tokens)):
        dh = dh + d_out[t]
        dp, dc_before = loop.cell.backward(dh, dc, loop.cells[t], loop.kept[t])
        if loop.real is not None:
            dp = dp.masked_fill(~loop.real[t][..., None], 0.0)
            dc_before = torch.where(loop.real[t], dc_before, dc)
        dps[t] = dp
        d_read = torch.bmm(dps[t].view(rows * groups, 1, width), state)
        d_read = d_read.view(rows, groups, width).sum(1) if groups > 1 else d_read.view(rows, width)
        dh_before = softmax_backward(loop.softmaxed[t], d_read)
        if loop.real is not None:
            dh_before = torch.where(loop.real[t], dh_before, dh)
        dh, dc = dh_before, dc_before
        state.addcmul_(loop.inserted[t].mT, loop.k[t], value=-1)  # R as it was before token t
    dp = dps.movedim(0, 2).reshape(*shape[:2], groups, tokens, width)
    return dp, dh.view(shape), dc.view(shape)


def softmax_backward(softmaxed: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x from that of softmax(x) over the last dimension."""
    weighted = softmaxed * grad
    return weighted - softmaxed * weighted.sum(-1, keepdim=True)


def recurrent_writes(
    x: Tensor, recurrent: Tensor, state: Tensor, y: Tensor, padding: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    """The delta rule whose queries, keys, values and strengths see what was read before.

        [q, k, v, b]_t = x_t + tanh(y_{t-1}) U;  q and k through softmax, b through sigmoid
        W_t = W_{t-1} + b k (v - W_{t-1}^T k)^T;  y_t = W_t^T q

    Args:
        x: (B, H, T, 3 d + 1), recurrent: U (H, d, 3 d + 1).
        state, y: W (B, H, d, d) and y (B, H, d) before the first token.
        padding: (B, 1, T), true where W and y stay as they are; or None.

    Returns:
        y after every token (B, H, T, d), W and y after the last.
    """
    return _WriteLoop.apply(x, recurrent, state, y, padding)


class _WriteLoop(torch.autograd.Function):
    # rows are (H, B) here, so that U is multiplied by one matrix a head

    @staticmethod
    def forward(ctx, x, recurrent, state, y, padding):
        batch, heads, tokens, width = *x.shape[:3], state.shape[-1]
        rows = heads * batch
        real = None if padding is None else ~padding[:, 0].T.repeat(1, heads)[..., None]  # (T, rows, 1)
        x = x.permute(2, 1, 0, 3)  # (T, H, B, 3 d + 1)
        state = state.transpose(0, 1).reshape(rows, width, width).clone()
        y = y.transpose(0, 1).reshape(rows, width)
        tanhs, after = (x.new_empty(tokens, rows, width) for _ in range(2))
        addresses = x.new_empty(tokens, rows, 2, width)  # q and k
        kept = []
        with no_autocast(x.device.type):
            for t in range(tokens):
                torch.tanh(y, out=tanhs[t])
                p = torch.baddbmm(x[t], tanhs[t].view(heads, batch, width), recurrent)
                p = p.view(rows, 3 * width + 1)
                torch.softmax(p[:, : 2 * width].view(rows, 2, width), -1, out=addresses[t])
                if real is not None:
                    addresses[t, :, 1].masked_fill_(~real[t], 0.0)  # a zero key writes nothing
                q, k = addresses[t, :, :1], addresses[t, :, 1:]
                beta = p[:, None, -1:].sigmoid()
                error = torch.baddbmm(p[:, None, 2 * width : -1], k, state, alpha=-1)  # (rows, 1, d)
                inserted = beta * error
                state.addcmul_(k.mT, inserted)
                read = torch.bmm(q, state)[:, 0]
                y = read if real is None else torch.where(real[t], read, y)
                after[t] = y
                kept.append((beta, error, inserted))
        ctx.kept, ctx.sizes = kept, (batch, heads, tokens, width)
        out = after.view(tokens, heads, batch, width).permute(2, 1, 0, 3).contiguous()
        ctx.save_for_backward(recurrent, state, tanhs, addresses, real)
        state = state.view(heads, batch, width, width).transpose(0, 1).clone()
        return out, state, y.view(heads, batch, width).transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_state, dy):
        batch, heads, tokens, width = ctx.sizes
        rows = heads * batch
        recurrent, state, tanhs, addresses, real = ctx.saved_tensors
        state = state.mT.contiguous()
        d_out = d_out.permute(2, 1, 0, 3).reshape(tokens, rows, width)
        d_state = d_state.transpose(0, 1).reshape(rows, width, width).clone()
        dy = dy.transpose(0, 1).reshape(rows, width)
        back = recurrent.transpose(1, 2)
        dps = d_out.new_empty(tokens, rows, 3 * width + 1)
        with no_autocast(d_out.device.type):
            for t in reversed(range(tokens)):
                (beta, error, inserted), (q, k) = ctx.kept[t], addresses[t].split(1, dim=1)
                dy = dy + d_out[t]
                d_read = (dy if real is None else dy.masked_fill(~real[t], 0.0))[:, None]
                d_q = torch.bmm(d_read, state)
                d_state.addcmul_(q.mT, d_read)
                state.addcmul_(inserted.mT, k, value=-1)  # W as it was before token t
                d_inserted = torch.bmm(k, d_state)
                d_error = beta * d_inserted
                d_k = torch.bmm(inserted, d_state.mT).baddbmm_(d_error, state, alpha=-1)
                d_state.addcmul_(k.mT, d_error, value=-1)
                dp, d_addresses = dps[t], torch.cat([d_q, d_k], dim=1)
                dp[:, : 2 * width] = softmax_backward(addresses[t], d_addresses).flatten(1)
                dp[:, 2 * width : -1] = d_error[:, 0]
                dp[:, -1:] = ((d_inserted * error).sum(-1) * beta[:, 0]) * (1 - beta[:, 0])
                if real is not None:
                    dp.masked_fill_(~real[t], 0.0)
                d_tanh = torch.bmm(dp.view(heads, batch, 3 * width + 1), back).view(rows, width)
                before = d_tanh * (1 - tanhs[t] * tanhs[t])
                dy = before if real is None else torch.where(real[t], before, dy)
            d_x, tanhs = (x.view(tokens, heads, batch, x.shape[-1]).transpose(0, 1) for x in (dps, tanhs))
            d_recurrent = torch.bmm(tanhs.flatten(1, 2).transpose(1, 2), d_x.flatten(1, 2))
        d_x = d_x.permute(2, 0, 1, 3)
        d_state = d_state.view(heads, batch, width, width).transpose(0, 1)
        return d_x, d_recurrent, d_state, dy.view(heads, batch, width).transpose(0, 1), None
