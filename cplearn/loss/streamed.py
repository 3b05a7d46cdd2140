"""The CPLearn loss and its gradient, streamed over blocks of codes: exact, without the c x f_h float matrix.

The plain form is `cplearn_head.cplearn_loss` on the (n, c) logits; everything here equals it to rounding. With
logits s = h W for embeddings h that carry the scale, log-assignments l = s - logsumexp(s), p = exp(l), V views
of which the first G are global, and for each global view g

    r_ij = sum of l over the other views,   t_i = sum_j p_ij r_ij,
    lambda_j = log mean_i p_ij over the prior's population,

the loss is  -alpha sum_g sum_i t_i + mean_g prior(lambda)  with alpha = beta / (G (V - 1) n), and its gradient with
respect to the logits of view v (the prior as reverse KL: a_j = lambda_j + log c, u_i = sum_j p_ij a_j)

    alpha (G p - sum of p over the global views)                       as a prediction, every view
    - alpha p (r - t)  +  1 / (G n) p (a - u)                          as a target and in the prior, global views

(each line is a softmax derivative; the forward prior has -exp(l - lambda) / c in place of p a). The gradient with
respect to h is this times W^T, so three passes over blocks of codes suffice:

    A   for each block of codes:   s = h W_block;  running logsumexp of each row
    B   for each block of codes:   l = s - logsumexp;  p = exp(l)
                                   t, entropy += sums over codes
                                   lambda[block] = log mean of p over images, ranks and kept steps
                                   u += sums over codes
        loss = -alpha sum t + prior(lambda)
    C   for each block of codes:   ds = the two lines above
                                   dh += ds W_block^T

Forms, all behind `streamed_loss`: `stored` keeps the logits of pass A and overwrites them (4 products of n x f_h x c
for two views, as many as autograd needs); `recomputed` multiplies again in each pass (8 products, memory
O(n f_h + c)); both are in `blockwise.py`. `triton` does the same in kernels that read the packed bits
(`triton_kernels.py`).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cplearn.errors import UserError
from cplearn.loss.blockwise import blockwise_loss
from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec
from cplearn.precision import float32, tf32_products

FORMS = ("auto", "stored", "recomputed", "triton")

# `auto` keeps the logits up to this many bytes. A constant and not the free memory of the moment: the same command
# takes the same path everywhere.
STORED_LIMIT = 2**30


def pick_form(form: str, rows: int, out_dim: int) -> str:
    """Resolve `auto` by size: stored while the logits fit into `STORED_LIMIT`, recomputed above.

    `triton` is never picked: its kernels have not been timed on a GPU yet. Raises `UserError` for an unknown form.
    """
    if form not in FORMS:
        raise UserError(f"loss form {form!r} is unknown: {', '.join(FORMS)}")
    if form != "auto":
        return form
    return "stored" if rows * out_dim * 4 <= STORED_LIMIT else "recomputed"


def block_size(rows: int, dictionary: Dictionary, device: torch.device) -> int:
    """Return how many codes make a block: it stays in a CPU's cache, or is worth a launch on a GPU."""
    logits, codes = (2**24, 2**24) if device.type == "cuda" else (2**19, 2**21)  # numbers in a block
    block = min(max(256, logits // rows), max(256, codes // dictionary.embed_dim), 2**16)
    return dictionary.whole_blocks(block)


def streamed_loss(
    h: list[Tensor],
    dictionary: Dictionary,
    scale: float,
    spec: LossSpec,
    *,
    form: str = "auto",
    block: int | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute the loss `spec` of the logits `scale * h W`, as `cplearn_head.cplearn_loss` does.

    Half precision is raised to float32, also under autocast; float64 stays. `form` is one of FORMS, `block` the
    number of codes at a time. `precision` is that of the products' inputs on a GPU: ieee (float32), tf32, or in
    the triton form bf16; sums are float32 always. Differentiable once. Under torch.compile this is a graph break.

    Shape: one (n, f_h) tensor of embeddings per view, the global crops first -> scalar loss; detached scalars loss,
    invariance, prior, entropy; detached mean assignment over population and global views (c,).
    """
    spec.check_views(len(h))
    # The decorator would import the compiler with this file, at more than a second.
    run = torch.compiler.disable(_streamed_loss) if torch.compiler.is_compiling() else _streamed_loss
    return run(h, dictionary, scale, spec, form, block, precision)


def _streamed_loss(h, dictionary, scale, spec, form, block, precision):
    device, rows = h[0].device, len(h) * len(h[0])
    with torch.autocast(device.type, enabled=False):
        stacked = torch.stack([float32(x) for x in h]) * scale
        form = pick_form(form, rows, dictionary.out_dim)
        with_grad = torch.is_grad_enabled() and stacked.requires_grad
        if form == "triton":
            try:
                from cplearn.loss.triton_kernels import triton_loss
            except ImportError:  # not on every system
                raise UserError("loss form triton needs the triton package: use --loss_form auto") from None
            compute, options = triton_loss, {"precision": precision}
        else:
            block = block or block_size(rows, dictionary, device)
            compute, options = blockwise_loss, {"store": form == "stored", "block": block}
        with tf32_products(precision == "tf32"):
            values = _Streamed.apply(stacked, compute, dictionary, spec, {"with_grad": with_grad, **options})
        loss, invariance, prior, entropy, usage = values
    terms = {"loss": loss.detach(), "invariance": invariance, "prior": prior, "entropy": entropy}
    return loss, terms, usage


class _Streamed(torch.autograd.Function):
    """The gradient is computed with the loss and handed out in backward."""

    @staticmethod
    def forward(ctx, h, compute, dictionary, spec, options):
        *values, grad = compute(h, dictionary, spec, **options)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None, None
