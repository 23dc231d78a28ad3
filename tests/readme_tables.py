"""Renders the tables of README and deployments/*.md from code and `tests/golden/measured/*.jsonl`; run it to write
them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from cards_table import cards_table
from families_table import families_table

from buddymoe_ray.config import EngineConfig, option_notes
from buddymoe_ray.models.schemes import METHODS
from buddymoe_ray.serve.args import ServeArgs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPTIONS = ROOT / "deployments" / "README.md"
FIGURES = ROOT / "deployments" / "MEASURED.md"
MEASURED = Path(__file__).parent / "golden" / "measured"

COLUMNS = {
    "model": ("model", str),
    "mode": ("mode", str),
    "batch": ("batch", str),
    "decode_tok_s": ("decode tok/s", "{:.1f}"),
    "p99_itl_ms": ("p99 ITL ms", "{:.0f}"),
    "hit_rate": ("hits %", "{:.1f}"),
    "standin_rate": ("stand-ins %", "{:.1f}"),
    "bytes_read_per_token": ("MB read / token", lambda value: f"{value / 1e6:.2f}"),
    "peak_rss_bytes": ("peak RSS MB", lambda value: f"{value / 1e6:.0f}"),
}


def config_table() -> str:
    """Every EngineConfig field, its default, and what its documentation says."""
    return _options(EngineConfig, {field.name: field.default for field in dataclasses.fields(EngineConfig)})


def methods_table() -> str:
    """What of each `quant_method` is served."""
    rows = (f"| `{method}` | {what} |" for method, what in METHODS.items())
    return "\n".join(["| `quant_method` | weights |", "|---|---|", *rows])


def service_table() -> str:
    """The same of what ServeArgs adds."""
    own = {name: field.default for name, field in ServeArgs.model_fields.items() if name not in EngineConfig.names()}
    return _options(ServeArgs, own)


def _options(cls: type, defaults: dict[str, Any]) -> str:
    notes = option_notes(cls)
    rows = ["| option | default | meaning |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | `{default}` | {notes[name]} |" for name, default in defaults.items())])


def records(name: str) -> list[dict[str, Any]]:
    """JSON lines of a command, as it printed them."""
    return [json.loads(line) for line in (MEASURED / f"{name}.jsonl").read_text().splitlines()]


def speed_table() -> str:
    """Rows of `buddymoe bench --json`."""
    rows = ["| " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for name in ("tiny", "olmoe"):
        for record in records(name):
            shown = record | {"model": "builtin:tiny" if name == "tiny" else "OLMoE"}
            rows.append("| " + " | ".join(_cell(shown[key], form) for key, (_, form) in COLUMNS.items()) + " |")
    return "\n".join(rows)


def standins_table(*, without: tuple[str, ...] = ()) -> str:
    """Rows of `buddymoe eval --mode fast --json`: a line per stand-in, a column per memory."""
    found = {
        (r.get("policy"), r["standin"], r["memory"]): r for r in records("standins") if r["standin"] not in without
    }
    memories = sorted({memory for _, _, memory in found}, key=lambda text: -float(text.rstrip("%")))
    names = list(dict.fromkeys((policy, standin) for policy, standin, _ in found))
    rows = [
        "| stand-in | " + " | ".join(memories) + " | KL×1000 at 50% | top-1 at 50% |",
        "|---|" + "---|" * (len(memories) + 2),
    ]
    for policy, standin in names:
        cells = [_rise(found.get((policy, standin, memory))) for memory in memories]
        half = found.get((policy, standin, "50%"), {})
        name = "BuddyMoE whole" if policy == "buddymoe" else f"`{standin}`"
        cells += [f"{1000 * half['kl']:.3g}", f"{half['top1_agreement']:.1f}"] if "kl" in half else ["–", "–"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def accuracy_table() -> str:
    """Rows of `buddymoe eval --tasks --json`; last, the family of tasks that lost most."""
    rows = ["| | right % | difference | misses % | of them fetched % | lost most |", "|---|---|---|---|---|---|"]
    for r in records("tasks"):
        name = "BuddyMoE whole" if r.get("policy") == "buddymoe" else f"`{r['mode']}`"
        standin = f", `{r['standin']}`" if r.get("standin", "auto") != "auto" else ""
        lost = min(r["by_task"], key=lambda family: r["by_task"][family]["difference"])
        most = f"{lost} {_points(r['by_task'][lost])}" if r["by_task"][lost]["difference"] < 0 else "–"
        cells = [f"{r['accuracy']:.1f}", _points(r), f"{r['miss_rate']:.0f}", f"{r['fetched_fraction']:.0f}", most]
        rows.append(f"| {name} at {r['memory']}{standin} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def bounded_table() -> str:
    """Rows of `buddymoe eval --mode bounded --json`, and of int8 experts in `fast`."""
    found = {(r["budget"], r["memory"]): r for r in records("bounded")}
    memories = sorted({memory for _, memory in found}, key=lambda text: float(text.rstrip("%")))
    budgets = sorted({budget for budget, _ in found})
    rows = ["| memory | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " | int8 experts |"]
    rows.append("|---|" + "---|" * (len(budgets) + 1))
    int8 = {r["memory"]: r for r in records("int8")}
    for memory in memories:
        cells = [f"{_rise(found[b, memory])} ({found[b, memory]['fetched_fraction']:.0f}%)" for b in budgets]
        rows.append(f"| {memory} | " + " | ".join([*cells, _rise(int8.get(memory))]) + " |")
    return "\n".join(rows)


def placement_table() -> str:
    """Rows of `buddymoe eval --json` with static and with dynamic placement."""
    found = {(r.get("placement", "static"), r["mode"], r["memory"]): r for r in records("placement")}
    columns = [(placement, mode) for mode in ("fast", "bounded") for placement in ("static", "dynamic")]
    rows = ["| memory | " + " | ".join(f"{mode}, {placement}" for placement, mode in columns) + " |"]
    rows.append("|---|" + "---|" * len(columns))
    for memory in sorted({memory for _, _, memory in found}, key=lambda text: float(text.rstrip("%"))):
        cells = [_rise(found.get((*column, memory))) for column in columns]
        rows.append(f"| {memory} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def workers_table() -> str:
    """Rows of `buddymoe bench --workers --json`, several rounds of each kind."""
    kinds = {"1": "1", "2": "2, shared", "2i": "2, isolated"}
    rounds = {kind: [r for r in records("workers") if r["kind"] == kind] for kind in kinds}
    alone = [r["decode_tok_s"] for r in rounds["1"]]
    rows = ["| workers | tok/s | × one worker | MB read / token | hits % |", "|---|---|---|---|---|"]
    for kind, name in kinds.items():
        speeds = [r["decode_tok_s"] for r in rounds[kind]]
        ratio = median([speed / other for speed, other in zip(speeds, alone, strict=True)])
        read, hits = (median([r[key] for r in rounds[kind]]) for key in ("bytes_read_per_token", "hit_rate"))
        speed = f"{median(speeds):.2f} ({min(speeds):.2f}–{max(speeds):.2f})"
        rows.append(f"| {name} | {speed} | {ratio:.2f} | {read / 1e6:.0f} | {hits:.0f} |")
    return "\n".join(rows)


def peers_table() -> str:
    """Rounds of llama.cpp and `buddymoe bench`, taking turns; of prompts longer than 32 tokens the prefill alone."""
    rounds, keys = records("peers"), ("engine", "model", "memory", "prompt_tokens")
    rows = [
        "| skew | experts in memory | | llama.cpp tok/s | ours tok/s | ratio | MB read a token, theirs / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, memory, tokens in dict.fromkeys((r["model"], r["memory"], r["prompt_tokens"]) for r in rounds):
        theirs, ours = (
            [r for r in rounds if tuple(r[key] for key in keys) == (name, model, memory, tokens)]
            for name in ("llama.cpp", "buddymoe_ray")
        )
        read = (median(r.get("bytes_read_per_token", 0.0) for r in side) / 1e6 for side in (theirs, ours))
        shares = {"decode": " / ".join(f"{share:.3g}" for share in read)} if tokens == 32 else {}
        shares["prefill"] = ""
        for what, share in shares.items():
            pairs = [(r[f"{what}_tok_s"], o[f"{what}_tok_s"]) for r, o in zip(theirs, ours, strict=True)]
            cells = [[pair[0] for pair in pairs], [pair[1] for pair in pairs], [own / other for other, own in pairs]]
            shown = " | ".join(f"{median(c):.3g} ({min(c):.3g}–{max(c):.3g})" for c in cells)
            name = what if tokens == 32 else f"{what} of {tokens:,} tokens"
            rows.append(f"| {model.rpartition(' ')[2]} | {memory} | {name} | {shown} | {share} |")
    return "\n".join(rows)


def vllm_table() -> str:
    """Rounds of beside_vllm.py."""
    rounds = records("vllm")
    rows = ["| | sequences | vLLM tok/s | ours tok/s | ratio | by CPU seconds |", "|---|---|---|---|---|---|"]
    for what, batch in dict.fromkeys((r["what"], r["batch"]) for r in rounds):
        theirs, ours = (
            [r for r in rounds if (r["engine"], r["what"], r["batch"]) == (name, what, batch)]
            for name in ("vllm", "buddymoe_ray")
        )
        pairs = list(zip(theirs, ours, strict=True))
        speeds = [[r["tok_s"] for r in side] for side in (theirs, ours)]
        speeds.append([own["tok_s"] / other["tok_s"] for other, own in pairs])
        shown = " | ".join(f"{median(c):.3g} ({min(c):.3g}–{max(c):.3g})" for c in speeds)
        by_cpu = median([own["tok_cpu_s"] / other["tok_cpu_s"] for other, own in pairs])
        name = what if what == "decode" else f"prefill of {ours[0]['prompt_tokens']:,} tokens each"
        rows.append(f"| {name} | {batch} | {shown} | {by_cpu:.3g} |")
    return "\n".join(rows)


def prompts_table() -> str:
    """Rows of `buddymoe bench --turns 2 --json`, with the `prefill_chunk` that was given."""
    rows = [
        "| model | memory | tokens | most a pass | first token ms | MB read | second turn ms | cached tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records("prompts"):
        told = (r["model"], r["memory"], r["prompt_tokens"], r["prefill_chunk"] or "as fits")
        first, read = f"{r['ttft_ms']:,.0f}", f"{r['prefill_bytes_read'] / 1e6:,.0f}"
        again = (f"{r['ttft_second_turn_ms']:,.0f}", f"{r['cached_tokens']:,.0f}")
        rows.append("| " + " | ".join(map(str, (*told, first, read, *again))) + " |")
    return "\n".join(rows)


def beside_table() -> str:
    """Rows of `buddymoe bench --beside N --json`."""
    rows = [
        "| model | memory | prompt | first token s, alone / beside | ratio | p99 ITL ms, alone / beside | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records("beside"):
        cells = list[str]()
        for what, scale in (("ttft", 1e3), ("p99_itl", 1.0)):
            alone, beside = r[f"beside_{what}_alone_ms"] / scale, r[f"beside_{what}_ms"] / scale
            cells += [f"{alone:.3g} / {beside:.3g}", f"{beside / alone:.2f}"]
        rows.append(f"| {r['model']} | {r['memory']} | {r['beside']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def lowbit_table() -> str:
    """Rounds of `buddymoe bench --memory 50%,100% --mode fast --standin lowbit --rounds 1 --json`."""
    rows = ["| memory | tok/s | stand-ins % | of resident |", "|---|---|---|---|"]
    rounds = records("lowbit")
    resident = [r["decode_tok_s"] for r in rounds if r["memory"] == "100%"]
    for memory in dict.fromkeys(r["memory"] for r in rounds):
        mine = [r for r in rounds if r["memory"] == memory]
        speeds, share = [r["decode_tok_s"] for r in mine], mine[0]["standin_rate"]
        ratios = [own / full for own, full in zip(speeds, resident, strict=True)]
        shown = (f"{median(c):.3g} ({min(c):.3g}–{max(c):.3g})" for c in (speeds, ratios))
        rows.append(f"| {memory} | {f' | {share:.1f} | '.join(shown)} |")
    return "\n".join(rows)


def rounding_table() -> str:
    """Rows of `python tests/rounding_quality.py`: a line per rounding, rise and divergence at every width."""
    found = {(r["rounding"], r["unbiased"], r["bits"]): r for r in records("rounding")}
    widths = sorted({bits for *_, bits in found})
    titles = [f"rise %, {bits} bits | KL×1000" for bits in widths]
    rows = ["| rounding | scales | " + " | ".join(titles) + " |", "|" + "---|" * (2 + 2 * len(widths))]
    for name, unbiased in dict.fromkeys(key[:2] for key in found):
        cells = []
        for r in (found[name, unbiased, bits] for bits in widths):
            cells.append(f"{r['dppl_percent']:.2f} ± {r['dppl_se']:.2f}")
            cells.append(f"{1000 * r['kl']:.2f} ± {1000 * r['kl_se']:.2f}")
        scales = "unbiased" if unbiased else "least squares"
        rows.append(f"| {name} | {scales} | {' | '.join(cells)} |")
    return "\n".join(rows)


def split_table() -> str:
    """Rows of `python tests/split_experts.py`: by disk, two pieces over one piece."""
    found = records("split")
    disks = sorted({r["disk_gbps"] for r in found})
    titles = [f"{disk:g} GB/s" for disk in disks]
    rows = [f"| routes | memory | {' | '.join(titles)} | best, reads cost no time of the thread |"]
    rows.append("|---|---|" + "---|" * (len(disks) + 1))
    for name, memory in dict.fromkeys((r["routes"], r["memory"]) for r in found):
        mine = [r for r in found if (r["routes"], r["memory"]) == (name, memory)]
        ratios = {(r["disk_gbps"], r["handling_us"] > 0): r["ms"][1] / r["ms"][0] for r in mine}
        read = {r["disk_gbps"]: r["mb"][1] / r["mb"][0] for r in mine if r["handling_us"]}
        cells = [f"{ratios[disk, True]:.2f} ({read[disk]:.2f})" for disk in disks]
        free = min(disks, key=lambda disk: ratios[disk, False])
        cells.append(f"{ratios[free, False]:.2f} at {free:g} GB/s")
        rows.append(f"| {name} | {memory}% | {' | '.join(cells)} |")
    return "\n".join(rows)


def dense_table() -> str:
    """Rows of `buddymoe eval --mode exact --dense-dtype X --json`."""
    rows = ["| dense weights | rise % | KL×1000 | top-1 |", "|---|---|---|---|"]
    for r in records("dense"):
        rise = f"{r['dppl_percent']:.2f} ± {r['dppl_se']:.2f}"
        rows.append(f"| {r['dense_dtype']} | {rise} | {1000 * r['kl']:.3g} | {r['top1_agreement']:.1f} |")
    return "\n".join(rows)


def stored_table() -> str:
    """Rows of `tests/stored_prices.py`."""
    found = records("stored")
    memories = list(dict.fromkeys(r["memory"] for r in found))
    rows = [f"| stored as | perplexity, exact | {' | '.join(f'{m} rise %' for m in memories)} |"]
    rows.append("|" + "---|" * (2 + len(memories)))
    for model in dict.fromkeys(r["model"] for r in found):
        mine = {r["memory"]: r for r in found if r["model"] == model}
        exact = next(r["ppl_exact"] for r in mine.values() if "error" not in r)
        cells = " | ".join(_rise(mine.get(memory)) for memory in memories)
        rows.append(f"| {model.partition(', ')[2]} | {exact:.2f} | {cells} |")
    return "\n".join(rows)


def formats_table() -> str:
    """Rows of `tests/format_rates.py`: shares of what a core reads, medians (least to most)."""
    found = {(r["format"], tuple(r["shape"])): r["share"] for r in records("formats")}
    shapes = list(dict.fromkeys(shape for _, shape in found))
    rows = [f"| stored as | {' | '.join(f'{N} x {K}' for N, K in shapes)} |", "|---|" + "---|" * len(shapes)]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [found[name, shape] for shape in shapes]
        rows.append(f"| {name} | {' | '.join(f'{mid:.2f} ({low:.2f}–{high:.2f})' for mid, low, high in cells)} |")
    return "\n".join(rows)


def memory_table() -> str:
    """Rows of `tests/cluster_check.py --check memory`."""
    rows = ["| workers | store MB | PSS MB | copies |", "|---|---|---|---|"]
    for r in records("memory"):
        store, charged = r["store_bytes"] / 1e6, r["pss_bytes"] / 1e6
        rows.append(f"| {r['workers']} | {store:.1f} | {charged:.1f} | {r['copies']:.2f} |")
    return "\n".join(rows)


def shift_table() -> str:
    """Rows of `tests/cluster_check.py --check shift`."""
    rows = [
        "| placement | hits before | hits after, by window | oracle | windows to within 2 points | p99 ITL after |",
        "|---|---|---|---|---|---|",
    ]
    found = records("shift")
    for placement in ("dynamic", "static"):
        runs = [r for r in found if r["placement"] == placement]
        after = [median([r["hit_after"][at] for r in runs]) for at in range(len(runs[0]["hit_after"]))]
        back = [r["windows_to_recover"] for r in runs]
        windows = "never" if None in back else f"{median(back):.0f} ({min(back)}–{max(back)})"
        control = [r for r in found if r["placement"] == "static"]
        ratios = [r["p99_itl_ms_after"] / c["p99_itl_ms_after"] for r, c in zip(runs, control, strict=True)]
        shown = " ".join(f"{rate:.0f}" for rate in after)
        before, oracle = (median([r[key] for r in runs]) for key in ("hit_before", "oracle_static"))
        ratio = f"{median(ratios):.2f} × control"
        rows.append(f"| {placement} | {before:.0f} | {shown} | {oracle:.0f} | {windows} | {ratio} |")
    return "\n".join(rows)


def delayed_table() -> str:
    """Rows of `tests/delayed_links.py`."""
    rows = [
        "| model | run | p99 × no misses | median ms | hits | fetched | low-bit | buddies |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records("delayed"):
        low, high = r["p99_ratio_range"]
        accesses = " | ".join(str(r[key]) for key in ("hits", "fetched", "lowbit", "buddy"))
        ratio = f"{r['p99_ratio']:.2f} ({low:.2f}–{high:.2f})"
        rows.append(f"| {r['model']} | {r['run']} | {ratio} | {r['median_itl_ms']:.1f} | {accesses} |")
    return "\n".join(rows)


def throttled_table() -> str:
    """Rows of `tests/throttled_link.py`."""
    rows = [
        "| model | memory | mode | link MB/s | tok/s, foretold / measured | first token s | hits % | MB read / token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records("throttled"):
        said, was = r["foretold"], r["measured"]
        pairs = [f"{said[key]:.3g} / {was[key]:.3g}" for key in ("tok_s", "ttft_s", "hit_percent")]
        pairs.append(f"{said['read_bytes'] / 1e6:.2f} / {was['read_bytes'] / 1e6:.2f}")
        told = (r["model"], r["memory"], r["mode"], f"{r['link_bytes_s'] / 1e6:.3g}", *pairs)
        rows.append(f"| {' | '.join(told)} |")
    return "\n".join(rows)


def nodes_table() -> str:
    """Rows of `tests/nodes_of_gpus.py`, of one and of all GPUs; – where copies of all experts do not fit."""
    found = {(r["model"], r["memory"], r["card"], r["mode"], r["gpus"]): r for r in records("nodes")}
    gpus, modes = (sorted({key[4] for key in found}), list(dict.fromkeys(key[3] for key in found)))
    ends = [gpus[0], gpus[-1]]
    titles = [f"tok/s of {count}: {' / '.join(modes)}" for count in ends]
    first = f"first token s, {' / '.join(map(str, gpus))} reading together"
    rows = [f"| model | memory of each | links | {' | '.join(titles)} | {first} |", "|---|---|---|---|---|---|"]
    for model, memory, card in dict.fromkeys(key[:3] for key in found):
        told = [found[model, memory, card, modes[0], 1]["gib"]]
        cells = [" / ".join(_speed(found.get((model, memory, card, mode, count))) for mode in modes) for count in ends]
        cells.append(" / ".join(f"{found[model, memory, card, 'exact', count]['ttft_s']:.3g}" for count in gpus))
        rows.append(f"| {model} | {100 * memory:.0f} %, {told[0]:.0f} GiB | {card} | {' | '.join(cells)} |")
    return "\n".join(rows)


def failures_table(name: str) -> str:
    """Rows of `tests/cluster_scenario.py --kill` or `tests/namespaces.py`."""
    found = records(name)
    whole = {r["recovered"]: r["seconds"] for r in found if "recovered" in r}
    rows = [
        "| while | streams exact | moved | longest wait of a stream s | whole again after s |",
        "|---|---|---|---|---|",
    ]
    for r in found:
        if "phase" in r:
            name = r["phase"]
            back = whole.get(name.removeprefix("kill "))
            exact, seconds = f"{r['same']} of {r['streams']}", "–" if back is None else f"{back:.1f}"
            rows.append(f"| {name} | {exact} | {r['resumed']} | {r['longest_wait_seconds']:.2f} | {seconds} |")
    return "\n".join(rows)


def rendered(text: str) -> str:
    """README with every marked table made anew."""
    return _filled(text, {"standins": standins_table(without=("lowbit12", "lowbit23", "buddy:output", "random"))})


def figures_page(text: str) -> str:
    """`deployments/MEASURED.md` with its tables made anew."""
    tables = {
        "accuracy": accuracy_table(),
        "standins": standins_table(),
        "bounded": bounded_table(),
        "placement": placement_table(),
        "speed": speed_table(),
        "peers": peers_table(),
        "vllm": vllm_table(),
        "prompts": prompts_table(),
        "beside": beside_table(),
        "lowbit": lowbit_table(),
        "split": split_table(),
        "dense": dense_table(),
        "rounding": rounding_table(),
        "stored": stored_table(),
        "formats": formats_table(),
        "workers": workers_table(),
        "memory": memory_table(),
        "shift": shift_table(),
        "delayed": delayed_table(),
        "failures": failures_table("failures"),
        "network": failures_table("network"),
        "throttled": throttled_table(),
        "nodes": nodes_table(),
    }
    return _filled(text, tables)


def options_page(text: str) -> str:
    """`deployments/README.md` with its tables made anew."""
    tables = {"config": config_table(), "service": service_table(), "cards": cards_table()}
    return _filled(text, tables | {"families": families_table(), "methods": methods_table()})


def _filled(text: str, tables: dict[str, str]) -> str:
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
        assert found == 1, f"there are {found} places for table {name}, must be one"
    return text


def _rise(record: dict[str, Any] | None) -> str:
    if record is None or "error" in record:
        return "–"
    rise, error = record["dppl_percent"], record["dppl_se"]
    shown = f"{rise:.0f} ± {error:.0f}" if rise >= 10 else f"{rise:.2f} ± {error:.2f}"
    fetched = record.get("policy") == "buddymoe"
    return f"{shown} ({record['fetched_fraction']:.0f}% fetched)" if fetched else shown


def _speed(record: dict[str, Any] | None) -> str:
    speed = 0.0 if record is None else record["tok_s"]
    return "–" if record is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _points(record: dict[str, Any]) -> str:
    return f"{record['difference']:+.1f} ± {record['difference_se']:.1f}".replace("-", "−")


def _cell(value: Any, form: Any) -> str:
    return form.format(value) if isinstance(form, str) else form(value)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
    OPTIONS.write_text(options_page(OPTIONS.read_text()))
    FIGURES.write_text(figures_page(FIGURES.read_text()))
