"""What of a layer is kept for the backward pass, by name; the rest is computed again.

Weights that were gathered or cast for a layer are not kept, as a copy of each layer's would be a copy of the model; but
for `none`, which does keep such copies: with large models take another.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "full", "dots", "dots_no_batch", "outputs"]

_WEIGHTS, ATTENTION_OUTPUT, MLP_OUTPUT = "weights", "attention_output", "mlp_output"
_policies = jax.checkpoint_policies
_POLICIES: dict[str, Callable[..., Any]] = {
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_saveable,
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
    "outputs": _policies.save_only_these_names(ATTENTION_OUTPUT, MLP_OUTPUT),
}


def name_weights(weights: Any) -> Any:
    """Mark weights as made anew for this layer."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _WEIGHTS), weights)


def rematerialise(block: Callable[..., Any], policy: Remat, *, is_unrolled: bool = False) -> Callable[..., Any]:
    """The body of a scan over layers, keeping what the policy says."""
    if policy == "none":
        return block
    # A loop keeps forward and backward apart; without one, what is computed again is fenced off from
    # common-subexpression elimination, or it would be kept after all.
    return jax.checkpoint(block, policy=_POLICIES[policy], prevent_cse=is_unrolled)
