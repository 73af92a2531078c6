"""The rules a plan keeps. Run on every plan that is derived, searched or read from a file."""

from __future__ import annotations

from amoeba_export.errors import InputError
from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.plan import LayerPlan, SubnetPlan


def validate(plan: SubnetPlan, architecture: Architecture) -> None:
    """Check `plan` against `architecture`.

    The rules: at least one layer; layers strictly increase and exist; every index is sorted, unique and in range; kept
    query heads are divided evenly over kept KV heads, each reading the KV head that it read in the supernet; heads and
    KV heads vanish together; all heads or none where a norm runs over all of them; under the `uniform` policy all
    layers keep the same counts; the tokens that logits are computed of are some, sorted, unique and in range.

    Raises:
        InputError: With every broken rule, not only the first.
    """
    problems: list[str] = []
    if not plan.layers:
        problems.append("it keeps no layer")
    kept = plan.kept_layers
    if list(kept) != sorted(set(kept)):
        problems.append(f"its layers are not in increasing order: {list(kept)}")
    if kept and not 0 <= min(kept) <= max(kept) < architecture.num_layers:
        problems.append(f"it names layers outside 0..{architecture.num_layers - 1}: {list(kept)}")
    if plan.shape.depth != len(plan.layers):
        problems.append(f"its shape says {plan.shape.depth} layers, it lists {len(plan.layers)}")
    for layer in plan.layers:
        problems.extend(f"layer {layer.source_layer}: {problem}" for problem in _layer_problems(layer, architecture))
    problems.extend(_token_problems(plan, architecture))
    counts = {layer.counts for layer in plan.layers}
    if plan.policy == "uniform" and len(counts) > 1:
        problems.append(f"it is called uniform and its layers keep different counts: {sorted(counts)}")
    if problems:
        raise InputError(
            f"The plan for {plan.shape} is not valid: {'; '.join(problems)}.",
            next_step="Derive the plan again from this model's strategy.",
        )


def _token_problems(plan: SubnetPlan, architecture: Architecture) -> list[str]:
    tokens = plan.head_tokens
    if tokens is None:
        return []
    if not tokens:
        return ["it computes logits of no token"]
    if list(tokens) != sorted(set(tokens)):
        return ["the tokens of its head are not sorted and unique"]
    if not 0 <= tokens[0] <= tokens[-1] < architecture.vocab_size:
        return [f"tokens of its head are outside 0..{architecture.vocab_size - 1}"]
    return []


def _layer_problems(layer: LayerPlan, architecture: Architecture) -> list[str]:
    problems = []
    for name, indices, size in (
        ("query heads", layer.query_heads, architecture.num_heads),
        ("KV heads", layer.kv_heads, architecture.num_kv_heads),
        (architecture.units, layer.ffn, architecture.ffn_size),
    ):
        if list(indices) != sorted(set(indices)):
            problems.append(f"{name} are not sorted and unique")
        elif indices and not 0 <= indices[0] <= indices[-1] < size:
            problems.append(f"{name} outside 0..{size - 1}")
    per_kv = dict.fromkeys(layer.kv_heads, 0)
    for query in layer.query_heads:
        kv = query // architecture.heads_per_kv
        if kv not in per_kv:
            problems.append(f"query head {query} reads KV head {kv}, which is not kept")
        else:
            per_kv[kv] += 1
    if len(set(per_kv.values())) > 1:
        problems.append(f"KV heads serve different numbers of query heads: {per_kv}")
    if bool(layer.query_heads) != bool(layer.kv_heads) or 0 in per_kv.values():
        problems.append("query heads and KV heads must vanish together")
    if not architecture.cuts_heads and 0 < len(layer.query_heads) < architecture.num_heads:
        problems.append(
            f"it keeps {len(layer.query_heads)} of {architecture.num_heads} heads, and one norm runs over all of them: "
            "without some, the others would be scaled differently"
        )
    return problems
