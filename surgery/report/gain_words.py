"""A verdict in words: what was gained or lost in sentences, and the names of what was measured.

Perplexities are compared as factors, exp of the paired difference in NLL, with its 95% interval.
"""

from __future__ import annotations

import math

from .words import count_of, effect, finite, listing, number, score, visible, visible_name

SCHEMES = {
    "w8a8_static": "8 bit, static scales",
    "w8a8_dynamic": "8 bit, a scale per batch",
    "w8a8_per_token": "8 bit, a scale per token",
    "w4a4_static": "4 bit, static scales",
    "w4": "weights only, 4 bit",
    "kv4": "cache only, 4 bit",
    "kv2": "cache only, 2 bit",
}
EDITS = {
    "delete_first": "first tokens deleted",
    "insert_first": "first tokens inserted",
    "delete_middle": "middle tokens deleted",
    "insert_middle": "middle tokens inserted",
}
GATES = {
    "equivalence": "difference to the original behind the prefix, nats per token",
    "perplexity": "perplexity, times the bare original's",
    "streaming": "streaming, times the original that keeps its first",
    "massive_activations": "massive activations that are left",
}


def factor(difference: float | None) -> float:
    """exp of a difference in NLL; NaN where there is none."""
    if difference is None or math.isnan(difference):
        return math.nan
    return math.exp(difference) if difference < 700 else math.inf


def times(delta: dict | None) -> str:
    """2.48 (2.35 to 2.63): the factor and its interval, with the decimals that the interval allows."""
    mean, low, high = (factor((delta or {}).get(key)) for key in ("mean", "low", "high"))
    if not (finite(mean) and finite(low) and finite(high)):
        return number(mean)
    decimals = min(max(1 - math.floor(math.log10(max(high - low, 1e-9) / 2)), 2), 4)
    mean, low, high = (number(x, 3) if x >= 100 else f"{x:.{decimals}f}" for x in (mean, low, high))
    return f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def schemes(verdict: dict) -> list[tuple[str, dict]]:
    """(name, what the verdict has of it) of every quantised pair of models, those that really ran in int8 among them.

    First of all the same two models as they are, where there is anything to compare with them.
    """
    found = verdict.get("quantised") or {}
    if not found:
        return []
    scores, rows = verdict.get("perplexity") or {}, []
    if scores.get("bare") and scores.get("converted"):
        delta = {"original": None, "converted": (verdict.get("delta_nll") or {}).get("vs_bare")}
        whole = {"original": scores["bare"], "converted": scores["converted"], "delta_nll": delta}
        rows.append(("not quantised", whole))
    for name, entry in found.items():
        rows.append((SCHEMES.get(name, visible_name(name)), entry))
        if entry.get("executed"):
            rows.append((f"{SCHEMES.get(name, visible_name(name))}, run in int8", entry["executed"]))
    return rows


def kept_state(tuning: dict) -> dict:
    """The judgement on held-out text of the state that was kept."""
    return next(entry for entry in tuning["held_out"] if entry["step"] == tuning["best_step"])


# ---- sentences


def sentences(verdict: dict) -> list[str]:
    """The outcome in plain words, what failed first."""
    parts = (_prefix(verdict), _quality(verdict), _quantised(verdict), _stream(verdict), _tuned(verdict))
    return [*_outcome(verdict), *(text for text in parts if text)]


def _outcome(verdict: dict) -> list[str]:
    gates, checks = verdict.get("gates") or [], (verdict.get("integrity") or {}).get("checks") or []
    failed = [gate for gate in gates if not gate["passed"]]
    broken = [check for check in checks if not check["passed"]]
    said = [
        f"Failed: {gate_name(gate['name'])}: {shown(gate['value'])}, and asked for was at most {shown(gate['limit'])}."
        for gate in failed
    ]
    said += [f"Failed: {visible_name(check['name'])}: {visible_name(check['detail']).rstrip('.')}." for check in broken]
    if failed or broken:
        return said
    return [f"Passed: {count_of(len(gates), 'gate')} and {count_of(len(checks), 'check')} of the files."]


def _prefix(verdict: dict) -> str | None:
    prefix = verdict.get("prefix")
    if not prefix:
        return None
    tokens = prefix.get("tokens")
    named = listing([f"“{visible(token)}”" for token in tokens] if tokens else prefix["ids"], 16)
    return f"Folded into the slots: {'the tokens' if tokens else 'the token ids'} {named}."


def _quality(verdict: dict) -> str | None:
    delta = (verdict.get("delta_nll") or {}).get("vs_bare")
    return delta and f"Perplexity of the converted model, against the bare original: {effect({'delta_nll': delta})}."


def _quantised(verdict: dict) -> str | None:
    """Whose interval lies below the other's: stricter than a paired test of the two, which a verdict does not hold."""
    kinds: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for name, entry in schemes(verdict):
        before, after = (entry["delta_nll"][which] for which in ("original", "converted"))
        if before is None:
            continue
        ends = [delta[end] for delta in (before, after) for end in ("low", "high")]
        if not all(map(finite, ends)):
            ends = [0.0] * 4
        kind = "better" if ends[3] < ends[0] else "worse" if ends[2] > ends[1] else "no clear difference"
        kinds[kind].append(name)
    parts = [f"{kind} with {'; '.join(names)}" for kind, names in kinds.items() if names]
    if not parts:
        return None
    return f"The converted model, quantised, against the original, quantised alike: {' – '.join(parts)}."


def _stream(verdict: dict) -> str | None:
    found = verdict.get("streaming")
    if not found:
        return None
    said = {name: effect({"delta_nll": found["delta_nll"][f"{name}_vs_kept"]}) for name in ("original", "converted")}
    kept = found["original_kept"]["tokens_kept"]
    return (
        f"Streaming with nothing kept, against the original that keeps its first {kept} tokens: "
        f"the original is {_is(said['original'])}, the converted model {_is(said['converted'])}."
    )


def _is(said: str) -> str:
    return {"less than 1%": "less than 1% away", "too few chunks to tell": "not measurably different"}.get(said, said)


def _tuned(verdict: dict) -> str | None:
    found = verdict.get("tuning")
    if not found:
        return None
    best, start = kept_state(found), found["held_out"][0]
    if best["step"] == 0:
        return "Tuning: no step was better on held-out text than the start, so what was written is untuned."
    return (
        f"Tuning: kept is the state after step {best['step']:,}, where perplexity on held-out text had gone from "
        f"{score(start['ppl'])} to {score(best['ppl'])}."
    )


# ---- gates


def gate_name(name: str) -> str:
    """A gate's name in words."""
    if name in GATES:
        return GATES[name]
    kind, _, what = name.partition(".")
    if kind == "quantised":
        scheme, _, executed = what.partition(".")
        named = SCHEMES.get(scheme, visible_name(scheme))
        return f"quantised, {named}{', run in int8' if executed else ''}, times the bare original's"
    if kind == "cache_edits" and what in EDITS:
        return f"{EDITS[what]}, times the original that keeps its own"
    return f"drop in {visible_name(what.replace('.', ', '))}" if kind == "tasks" else visible_name(name)


def shown(value: float | str) -> str:
    """A gate's value or limit, with digits enough that what is just above a limit does not look like it."""
    return number(value, 6) if isinstance(value, int | float) else visible_name(value)
