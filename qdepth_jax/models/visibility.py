"""Which group of tokens sees which: the table from which every attention mask of the mixture is built.

Default `r1` (query row, key column), reading R1 of QDepth-VLA's hybrid mask; without depth it is open-pi-zero's mask:

             image  text  depth  proprio  action
    image      x     x      .       .       .
    text       x     x      .       .       .
    depth      x     x      x       .       .
    proprio    x     x      .       x       .
    action     x     x      x       x       x

`r2`: image and text see only themselves (the literal reading: "only within their modality").
`proprio_sees_depth`: the ablation "without hybrid attention", proprio also sees depth.

Attention inside a visible block is bidirectional. A group that a model lacks has size 0. Text padding is never a key,
nor is a view that an example lacks, nor are depth tokens where that is the main view, of which they are made.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from qdepth_jax import errors

# The order of tokens in the joint sequence; also of rows and columns of the mask.
GROUPS = ("image", "text", "depth", "proprio", "action")

# One row for each group: (query group, groups it sees). Tuples, so that a table can be a field of a frozen config.
Table = tuple[tuple[str, tuple[str, ...]], ...]

_R1: Table = (
    ("image", ("image", "text")),
    ("text", ("image", "text")),
    ("depth", ("image", "text", "depth")),
    ("proprio", ("image", "text", "proprio")),
    ("action", ("image", "text", "depth", "proprio", "action")),
)


def with_rows(table: Table, **rows: Sequence[str]) -> Table:
    """The table with some rows replaced, e.g. `with_rows(R1, proprio=("image", "proprio"))`."""
    return tuple((query, tuple(rows.get(query, keys))) for query, keys in table)


TABLES: dict[str, Table] = {
    "r1": _R1,
    "r2": with_rows(_R1, image=("image",), text=("text",)),
    "proprio_sees_depth": with_rows(_R1, proprio=("image", "text", "depth", "proprio")),
}


def resolve(table: str | Table) -> Table:
    """A name of TABLES or a table -> a checked table.

    Raises:
      UserError: unknown name, unknown group, or a group without exactly one row.
    """
    if isinstance(table, str):
        if table not in TABLES:
            raise errors.UserError(f"visibility {table!r} is unknown: use one of {sorted(TABLES)} or give a table")
        return TABLES[table]
    table = tuple((query, tuple(keys)) for query, keys in table)
    named = {group for query, keys in table for group in (query, *keys)}
    if unknown := sorted(named - set(GROUPS)):
        raise errors.UserError(f"visibility table names unknown groups {unknown}: groups are {GROUPS}")
    rows = sorted(query for query, _ in table)
    if rows != sorted(GROUPS):
        raise errors.UserError(f"visibility table needs one row for each of {GROUPS}, got rows {rows}")
    return table


def check_cacheable(table: Table) -> None:
    """Raises UserError if any group besides `action` sees `action`: its keys would change at every flow step."""
    offenders = [query for query, keys in table if query != "action" and "action" in keys]
    if offenders:
        raise errors.UserError(
            f"cached sampling needs groups that do not see `action`, but {offenders} do: sample with cached=False"
        )


def mask(
    table: Table,
    sizes: Mapping[str, int],
    text_valid: Array,
    queries: Sequence[str] = GROUPS,
    keys: Sequence[str] = GROUPS,
    image_valid: Array | None = None,
    depth_valid: Array | None = None,
) -> Array:
    """The attention mask.

    Args:
      table: from `resolve`.
      sizes: tokens of each group; an absent group has none. sizes["text"] is L.
      text_valid: bool [B, L], True for real text tokens.
      queries, keys: the groups that form the rows and columns, in this order.
      image_valid: bool [B, image tokens], False for tokens of a view that an example lacks; None = all are there.
      depth_valid: bool [B, P], the same of depth tokens.

    Returns:
      bool [B, T, S]: query t sees key s. Rows of padding are like those of real text; nobody reads them.
    """
    sees = dict(table)
    block = np.array([[key in sees[query] for key in keys] for query in queries])
    rows = [sizes.get(group, 0) for group in queries]
    columns = [sizes.get(group, 0) for group in keys]
    visible = np.repeat(np.repeat(block, rows, axis=0), columns, axis=1)
    batch = text_valid.shape[0]
    given = {"text": text_valid, "image": image_valid, "depth": depth_valid}
    valid = [
        given[group] if given.get(group) is not None else jnp.ones((batch, size), bool)
        for group, size in zip(keys, columns, strict=True)
    ]
    return jnp.asarray(visible)[None] & jnp.concatenate(valid, axis=1)[:, None, :]


def picture(table: Table) -> str:
    """The table as text, as in the docstring of this module."""
    lines = [" " * 9 + "".join(f"{group:>9}" for group in GROUPS)]
    for query, keys in table:
        lines.append(f"{query:<9}" + "".join(f"{'x' if group in keys else '.':>9}" for group in GROUPS))
    return "\n".join(lines)
