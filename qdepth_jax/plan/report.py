"""A plan as text: what a reader needs before renting, largest worries first."""

from typing import Any

GIB = 2**30
TERA = 1e12


def text(result: dict[str, Any]) -> str:
    """The tables of `tools/plan_pod.py` from its own JSON."""
    lines = [f"{result['experiment']} on {result['topology']}: {result['chips']} chips, {result['hosts']} hosts"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    b = result["batch"]
    lines.append(
        f"mesh {mesh}; global batch {b['global']} = {b['micro_batches']} micro-batches of "
        f"{b['per_chip']} a chip x {b['ways']} ways; remat {result['remat']}"
    )
    lines += [
        "",
        *_state(result),
        "",
        *_memory(result),
        "",
        *_flops(result),
        "",
        *_network(result),
        "",
        *_speed(result),
    ]
    return "\n".join(lines)


def _state(result: dict[str, Any]) -> list[str]:
    s = result["state"]
    lines = [
        "state on each chip, by the sharding table",
        *_rows((n, f"{b / GIB:9.3f} GiB") for n, b in s["parts"].items()),
    ]
    lines += _rows([("total", f"{s['bytes'] / GIB:9.3f} GiB of {s['whole_bytes'] / GIB:.2f} GiB")])
    scale = ", ".join(f"{ways}: {size / GIB:.3f}" for ways, size in s["by_fsdp"])
    lines += [f"  GiB on each chip by fsdp: {scale}"]
    for path, size, pattern in s["copied"]:
        lines += [f"  whole on every chip: {path}, {size / 2**20:.2f} MiB, by row {pattern!r}"]
    if not s["copied"]:
        lines += ["  no leaf above 1 MiB lies whole on every chip"]
    return lines


def _memory(result: dict[str, Any]) -> list[str]:
    m = result["memory"]
    if m["compiled"]:
        lines = ["memory on each chip, by the compiler"]
        if m["fits"]:
            lines += _rows(
                (name, f"{m[key] / GIB:9.3f} GiB")
                for name, key in (
                    ("arguments (state, batch, key)", "arguments"),
                    ("results that are not in place", "new_outputs"),
                    ("temporary", "temporary"),
                    ("program", "code"),
                )
            )
    else:
        lines = ["memory on each chip, ESTIMATED without compiling"]
        lines += _rows((name, f"{m[name] / GIB:9.3f} GiB") for name in ("state", "gradients", "kept", "working"))
    room = m["limit"] - m["needed"]
    verdict = f"fits, {room / GIB:.3f} GiB to spare" if m["fits"] else f"DOES NOT FIT by {-room / GIB:.3f} GiB"
    return [*lines, f"  {'needed':<34}{m['needed'] / GIB:9.3f} GiB of {m['limit'] / GIB:.2f}: {verdict}"]


def _flops(result: dict[str, Any]) -> list[str]:
    f = result["flops"]
    lines = ["TFLOP of one example by formula (forward, backward)"]
    lines += _rows((n, f"{p['forward'] / TERA:9.4f} {p['backward'] / TERA:9.4f}") for n, p in f["parts"].items())
    lines += _rows(
        [
            ("model", f"{f['model_per_example'] / TERA:9.4f}"),
            (f"recomputed (remat {result['remat']})", f"{f['recomputed_per_example'] / TERA:9.4f}"),
            ("scanned last layer, nobody reads", f"{f['unread_per_example'] / TERA:9.4f}"),
            ("one step, model", f"{f['model_per_step'] / 1e15:9.3f} PFLOP"),
            ("one step, executed", f"{f['executed_per_step'] / 1e15:9.3f} PFLOP"),
        ]
    )
    return lines


def _network(result: dict[str, Any]) -> list[str]:
    c = result["collectives"]
    how = "of the compiled step" if c["compiled"] else "of the step, ESTIMATED without compiling"
    lines = [f"collectives {how}, on each chip (all loops counted)"]
    lines += [
        f"  {'kind':<20}{'dtype':<7}{'axes':<14}{'network':<8}{'count':>8}{'payload GiB':>13}{'received GiB':>14}"
    ]
    for row in c["rows"]:
        if row["sent"] >= 2**20:
            lines.append(
                f"  {row['kind']:<20}{row['dtype']:<7}{row['axes']:<14}{row['network']:<8}{row['count']:>8}"
                f"{row['payload'] / GIB:>13.3f}{row['sent'] / GIB:>14.3f}"
            )
    small = [row for row in c["rows"] if row["sent"] < 2**20]
    if small:
        count, sent = (sum(row[key] for row in small) for key in ("count", "sent"))
        lines.append(f"  and {count} small ones, {sent / 2**20:.3f} MiB received together")
    lines.append(f"  {'all':<57}{'':>13}{c['sent'] / GIB:>14.3f}")
    if c["compiled"]:
        lines.append(f"  {'by formula (ZeRO-3)':<57}{'':>13}{c['formula_sent'] / GIB:>14.3f}")
    if c["unknown_loops"]:
        lines.append(f"  loops without a known trip count, counted once: {', '.join(c['unknown_loops'])}")
    return lines


def _speed(result: dict[str, Any]) -> list[str]:
    lines = [
        "roofline: seconds of one step at data sheet peaks (best case if all overlaps; if nothing overlaps)",
        f"  {'chips':<24}{'compute':>9}{'HBM':>9}{'ICI':>9}{'DCN':>9}{'best':>9}{'worst':>9}  {'limit':<8}"
        f"{'MFU %':>12}{'samples/s':>12}{'ktokens/s':>11}{'hours':>9}{'chip-hours':>12}",
    ]
    for row in result["roofline"]:
        lines.append(
            f"  {row['chips']:<24}{row['compute']:>9.3f}{row['hbm']:>9.3f}{row['ici']:>9.3f}{row['dcn']:>9.3f}"
            f"{row['best']:>9.3f}{row['worst']:>9.3f}  {row['limit']:<8}"
            f"{100 * row['mfu_worst']:>6.1f}..{100 * row['mfu_best']:>4.1f}"
            f"{row['samples_per_second']:>12.0f}{row['tokens_per_second'] / 1e3:>11.0f}"
            f"{row['hours']:>9.2f}{row['chip_hours']:>12.0f}  {row['note']}"
        )
    lines.append(
        f"  rates and hours at best, for {result['total_steps']} steps. Nothing here was measured on a chip: a real "
        "step is slower."
    )
    return lines


def _rows(pairs) -> list[str]:
    return [f"  {name:<34}{value}" for name, value in pairs]


def candidates(rows: list[dict[str, Any]]) -> str:
    """The table of a search, best first."""
    lines = [
        f"  {'replica':>7}{'fsdp':>6}{'tensor':>7}{'micro':>6}{'a chip':>7}  {'remat':<6}{'GiB':>8}{'best s':>9}"
        f"{'worst s':>9}  verdict"
    ]
    for row in rows:
        speed = f"{row['best']:>9.3f}{row['worst']:>9.3f}" if row["best"] else f"{'':>18}"
        lines.append(
            f"  {row['replica']:>7}{row['fsdp']:>6}{row['tensor']:>7}{row['micro_batches']:>6}{row['per_chip']:>7}  "
            f"{row['remat']:<6}{row['needed'] / GIB:>8.2f}{speed}  {row['verdict']}"
        )
    return "\n".join(lines)
