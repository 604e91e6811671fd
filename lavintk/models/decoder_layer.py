"""One decoder layer of a Llama-like model, over the modules that transformers made for it.

transformers' own ``forward`` runs q, k and v, and gate and up, one after the other and works on ``[B, heads, S, d]``.
This one hands layers that share an input on together (:func:`lavintk.layers.forward_group`), keeps tokens flat, and
calls the fused kernels. The modules stay transformers', so names, checkpoints and adapters are the same either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lavintk.kernels import rms_norm, rms_norm_and_pass, rope
from lavintk.layers import forward_gated, forward_group, forward_onto, has_hooks
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

    def forward_and_pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` returns, and ``x`` for the residual; see :func:`rms_norm_and_pass`."""
        return rms_norm_and_pass(x, self.weight, self.variance_epsilon)

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
    normed, hidden = _normed(parts.input_layernorm, hidden)
    hidden = forward_onto(parts.self_attn.o_proj, _attended(parts.self_attn, normed, place), hidden)
    normed, hidden = _normed(parts.post_attention_layernorm, hidden)
    if isinstance(parts.mlp.act_fn, nn.SiLU) or type(parts.mlp.act_fn).__name__ == "SiLUActivation":
        inner = forward_gated(parts.mlp.gate_proj, parts.mlp.up_proj, normed)
    else:
        gate, up = forward_group([parts.mlp.gate_proj, parts.mlp.up_proj], normed)
        inner = parts.mlp.act_fn(gate) * up
    return forward_onto(parts.mlp.down_proj, inner, hidden)


def _normed(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``norm`` makes of ``hidden``, and ``hidden`` for the residual that goes around the norm."""
    if type(norm) is FrozenRMSNorm and not has_hooks(norm):
        return norm.forward_and_pass(hidden)
    return norm(hidden), hidden


def _attended(attention: Any, normed: Tensor, place: Place) -> Tensor:
    """Return what the heads see, side by side, ``[1, N + M, heads * d]``: the input of ``o_proj``."""
    projections = forward_group([attention.q_proj, attention.k_proj, attention.v_proj], normed)
    q, k, v = (x[0].unflatten(-1, (-1, attention.head_dim)) for x in projections)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if getattr(attention, "use_rope", True):  # SmolLM3 leaves every fourth layer without positions
        q, k = rope(q, k, place.cos, place.sin)
    window = _window(attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    attended = place.plan.attend(attention.layer_idx, q, k, v, scale=attention.scaling, window=window, dropout=dropout)
    return attended.flatten(1).unsqueeze(0)


def _window(attention: Any) -> int | None:
    """Return how many tokens back are seen. Mistral asks its configuration; Llama has that entry and ignores it."""
    if type(attention).__name__ == "MistralAttention":
        return cast("int | None", getattr(attention.config, "sliding_window", None))
    return cast("int | None", getattr(attention, "sliding_window", None))
