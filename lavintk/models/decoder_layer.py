"""One decoder layer of a Llama-like model, over the modules that transformers made for it.

transformers' own ``forward`` runs q, k and v, and gate and up, one after the other and works on ``[B, heads, S, d]``.
This one hands layers that share an input on together (:func:`lavintk.layers.forward_group`), keeps tokens flat, and
calls the fused kernels. The modules stay transformers', so names, checkpoints and adapters are the same either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lavintk.kernels import rms_norm, rope, swiglu
from lavintk.layers import forward_group
from lavintk.models.attention import AttentionPlan, PackPlan

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
"""Families whose decoder layer is computed here; the layers of others run as transformers wrote them."""
_LAYERS = frozenset(f"{family}DecoderLayer" for family in FAMILIES)
_NORMS = frozenset(f"{family}RMSNorm" for family in FAMILIES)


class FrozenRMSNorm(nn.Module):
    """RMSNorm (arXiv:1910.07467) whose weight is not trained, in place of transformers' own.

    :param weight: ``[width]``. :param eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        return rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """Describe the norm in ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


@dataclass(frozen=True)
class Place:
    """Where the tokens of a pass stand.

    :param plan: which of them see each other.
    :param cos: ``[N + M, d]`` of the rotary embedding; :param sin: likewise.
    """

    plan: AttentionPlan | PackPlan
    cos: Tensor
    sin: Tensor


def is_known(layer: nn.Module) -> bool:
    """Whether :func:`run_layer` computes what the layer's own ``forward`` does."""
    return type(layer).__name__ in _LAYERS


def replace_norms(model: nn.Module) -> None:
    """Put :class:`FrozenRMSNorm` in the place of the RMS norms of known families."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in _NORMS:
                norm: Any = child
                setattr(parent, name, FrozenRMSNorm(norm.weight, norm.variance_epsilon))


def run_layer(layer: nn.Module, hidden: Tensor, place: Place) -> Tensor:
    """Return the states ``[1, N + M, hidden]`` behind ``layer``, one of a known family."""
    parts: Any = layer
    hidden = hidden + _attention(parts.self_attn, parts.input_layernorm(hidden), place)
    normed = parts.post_attention_layernorm(hidden)
    gate, up = forward_group([parts.mlp.gate_proj, parts.mlp.up_proj], normed)
    if isinstance(parts.mlp.act_fn, nn.SiLU) or type(parts.mlp.act_fn).__name__ == "SiLUActivation":
        inner = swiglu(gate, up)
    else:
        inner = parts.mlp.act_fn(gate) * up
    return cast(Tensor, hidden + parts.mlp.down_proj(inner))


def _attention(attention: Any, normed: Tensor, place: Place) -> Tensor:
    projections = forward_group([attention.q_proj, attention.k_proj, attention.v_proj], normed)
    q, k, v = (x[0].unflatten(-1, (-1, attention.head_dim)) for x in projections)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if getattr(attention, "use_rope", True):  # SmolLM3 leaves every fourth layer without positions
        q, k = rope(q, k, place.cos, place.sin)
    window = _window(attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    attended = place.plan.attend(attention.layer_idx, q, k, v, scale=attention.scaling, window=window, dropout=dropout)
    return cast(Tensor, attention.o_proj(attended.flatten(1).unsqueeze(0)))


def _window(attention: Any) -> int | None:
    """Return how many tokens back are seen. Mistral asks its configuration; Llama has that entry and ignores it."""
    if type(attention).__name__ == "MistralAttention":
        return cast("int | None", getattr(attention.config, "sliding_window", None))
    return cast("int | None", getattr(attention, "sliding_window", None))
