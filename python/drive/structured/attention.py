"""nn.MultiheadAttention with fewer heads than its width would give it, which torch's own cannot have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeads(nn.MultiheadAttention):
    """The same parameters under the same names, of `heads` heads of the size that they had.

    Computed by `scaled_dot_product_attention`, in a forward pass of the same arguments and outputs.
    """

    def __init__(self, attention: nn.MultiheadAttention, heads: int):
        """
        Args:
            attention: whose tensors it takes, which have been cut already.
            heads: as many as these are of.
        """
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in attention.__dict__.items() if not k.startswith("__")})
        self.num_heads = heads
        self._qkv_same_embed_dim = False  # or torch would compute by the width (its fast path does)
        inner = heads * self.head_dim
        self.out_proj.in_features = inner

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        batched = query.dim() == 3
        inputs = [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )  # [B, heads, length, size]
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal and need_weights)
        dropout = self.dropout if self.training else 0.0
        attended: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            attended = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            found = attended @ v
            attended = attended.mean(1) if average_attn_weights else attended
        else:
            causal = is_causal and mask is None
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        outputs = self.out_proj(found.transpose(1, 2).flatten(-2))
        if not batched:
            return outputs.squeeze(0), None if attended is None else attended.squeeze(0)
        return outputs if self.batch_first else outputs.transpose(0, 1), attended

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, causal: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores, [B or 1, heads or 1, length, length]."""
        batch, length, others = q.shape[0], q.shape[2], k.shape[2]
        if mask is None and causal:
            mask = torch.ones(length, others, dtype=torch.bool, device=q.device).triu(1)
        found: Tensor | None = None
        if mask is not None:
            found = _added(mask, q)
            found = found.view(batch, -1, length, others) if found.dim() == 3 else found[None, None]
            if found.shape[1] not in (1, self.num_heads):
                raise ValueError(
                    f"attn_mask must be of {self.num_heads} heads, those that are left, or of one, got "
                    f"{found.shape[1]}"
                )
        if padding is not None:
            padded = _added(padding, q).view(-1, 1, 1, others)
            found = padded if found is None else found + padded
        return found


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: True is where nothing is attended to."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
