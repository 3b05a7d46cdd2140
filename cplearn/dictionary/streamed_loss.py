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

(theory of the closed form: each line is a softmax derivative; the forward prior has -exp(l - lambda) / c in place of
p a). The gradient with respect to h is this times W^T, so three passes over blocks of codes suffice:

    A  row logsumexp            B  column means, t, u           C  gradient

Forms, all behind `streamed_loss`: `stored` keeps the logits of pass A and overwrites them (4 products of n x f_h x c
for two views, as many as autograd needs); `recomputed` multiplies again in each pass (8 products, memory
O(n f_h + c)); `triton` does the same in kernels that read the packed bits (see `dictionary_kernels.py`).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cplearn.dictionary.blockwise import _loss_and_gradient
from cplearn.dictionary.codes import Dictionary
from cplearn.dictionary.hadamard import HadamardDictionary
from cplearn.dictionary.prior_buffer import PriorBuffer
from cplearn.distributed import collectives
from cplearn.errors import UserError

FORMS = ("auto", "stored", "recomputed", "triton")

# `auto` keeps the logits up to this many bytes. A constant and not the free memory of the moment: the same command
# takes the same path everywhere.
STORED_LIMIT = 2**30


def pick_form(form: str, rows: int, out_dim: int) -> str:
    """`auto` by size: stored while the logits fit into `STORED_LIMIT`, recomputed above; others as told.

    `triton` is never picked: its kernels have not been timed on a GPU yet.
    """
    if form not in FORMS:
        raise UserError(f"loss form {form!r} is unknown: {', '.join(FORMS)}")
    if form != "auto":
        return form
    return "stored" if rows * out_dim * 4 <= STORED_LIMIT else "recomputed"


def block_size(rows: int, dictionary: Dictionary, device: torch.device) -> int:
    """Codes a block: logits and codes of a block stay in a CPU's cache, or are worth a launch on a GPU."""
    logits, codes = (2**24, 2**24) if device.type == "cuda" else (2**19, 2**21)  # numbers in a block
    block = min(max(256, logits // rows), max(256, codes // dictionary.embed_dim), 2**16)
    if isinstance(dictionary, HadamardDictionary):  # whole Hadamard matrices
        block = max(1, block // dictionary.embed_dim) * dictionary.embed_dim
    return block


def streamed_loss(
    h: list[Tensor],
    dictionary: Dictionary,
    scale: float,
    beta: float,
    *,
    prior: str = "reverse",
    prior_group: str = "global",
    n_global: int = 2,
    buffer: PriorBuffer | None = None,
    form: str = "auto",
    block: int | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """beta * invariance + prior of the logits `scale * h W`, as `cplearn_head.cplearn_loss` computes it.

    Half precision is raised to float32, also under autocast; float64 stays. `form` is one of FORMS, `block` the
    number of codes at a time. `precision` is that of the products' inputs in the triton form: ieee (float32), tf32
    or bf16; sums are float32 always. Differentiable once. Under torch.compile this is a graph break.

    Shape: one (n, f_h) tensor of embeddings a view, the `n_global` global crops first -> scalar loss; detached
    scalars loss, invariance, prior, entropy; detached mean assignment over population and global views (c,).
    """
    if len(h) < 2 or not 1 <= n_global <= len(h):
        raise ValueError(f"streamed_loss needs two or more views, got {len(h)} with {n_global} global")
    if prior not in ("reverse", "forward") or prior_group not in ("global", "local"):
        raise ValueError(f"prior {prior!r} / prior_group {prior_group!r} is unknown")
    # The decorator would import the compiler with this file, at more than a second.
    run = torch.compiler.disable(_streamed_loss) if torch.compiler.is_compiling() else _streamed_loss
    return run(h, dictionary, scale, beta, prior, prior_group, n_global, buffer, form, block, precision)


def _streamed_loss(h, dictionary, scale, beta, prior, prior_group, n_global, buffer, form, block, precision):
    device = h[0].device
    with torch.autocast(device.type, enabled=False):
        stacked = torch.stack([x if x.dtype == torch.float64 else x.float() for x in h]) * scale
        form = pick_form(form, len(h) * len(h[0]), dictionary.out_dim)
        with_grad = torch.is_grad_enabled() and stacked.requires_grad
        block = block or block_size(len(h) * len(h[0]), dictionary, device)

        def population(log_mean: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            """log p-bar of this rank -> that of all ranks, and the one with the kept steps. Shape: (b, G)."""
            if prior_group == "global" and collectives.world_size() > 1:
                if prior == "forward":
                    log_mean = collectives.log_mean_over_ranks(log_mean)
                else:  # one all-reduce instead of two; p log p-bar is 0 where p-bar underflows
                    mean = collectives.mean_over_ranks(log_mean.exp())
                    log_mean = mean.clamp_min_(torch.finfo(mean.dtype).tiny).log_()
            return log_mean, log_mean if buffer is None else buffer.mix(log_mean.T, start, stop).T

        if form == "triton":
            try:
                from cplearn.dictionary import triton_kernels
            except ImportError:  # not on every system
                raise UserError("loss form triton needs the triton package: use --loss_form auto") from None

            def compute(x):
                return triton_kernels.loss_and_gradient(
                    x, dictionary, beta, prior, n_global, population, with_grad, precision
                )
        else:

            def compute(x):
                return _loss_and_gradient(
                    x, dictionary, beta, prior, n_global, population, with_grad, form == "stored", block
                )

        loss, invariance, prior_value, entropy, usage = _Streamed.apply(stacked, compute)
    terms = {"loss": loss.detach(), "invariance": invariance, "prior": prior_value, "entropy": entropy}
    return loss, terms, usage


class _Streamed(torch.autograd.Function):
    """The gradient is computed with the loss and handed out in backward."""

    @staticmethod
    def forward(ctx, h, compute):
        *values, grad = compute(h)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None
