"""The published mixes of Open X-Embodiment data sets, with their weights, as tables.

Weights are per frame ("balance_weights" of octo and OpenVLA, our `data.balance`): the share of a data set is its weight
times its frames. Sources: octo octo/data/oxe/oxe_dataset_mixes.py, OpenVLA prismatic/vla/datasets/rlds/oxe/mixtures.py,
open-pi-zero src/data/oxe/oxe_dataset_mixes.py. OpenVLA names its mixes oxe_magic_soup and rtx like octo's; here its
versions (Bridge without the first step, no set with wrist cameras alone) are magic_soup and rtx_openvla. Not here:
octo's oxe_franka and oxe_flex_act_soup, which hold sets that need resampling in time or have two arms.
"""

import difflib
import os

from qdepth_jax import errors
from qdepth_jax.data import data_config, definitions, spec

Mix = tuple[tuple[str, float], ...]

_RTX: Mix = (
    ("fractal20220817_data", 0.54087122203),
    ("kuka", 0.8341046294),
    ("bridge_dataset", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 2.0),
    ("berkeley_cable_routing", 3.0),
    ("roboturk", 1.0),
    ("nyu_door_opening_surprising_effectiveness", 5.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 1.0),
    ("toto", 1.0),
)

_SOUP: Mix = (
    ("fractal20220817_data", 0.54087122203),
    ("kuka", 0.8341046294),
    ("bridge_dataset", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 1.0),
    ("berkeley_cable_routing", 1.0),
    ("roboturk", 2.0),
    ("nyu_door_opening_surprising_effectiveness", 1.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 2.0),
    ("toto", 1.0),
    ("language_table", 0.1),
    ("stanford_hydra_dataset_converted_externally_to_rlds", 2.0),
    ("austin_buds_dataset_converted_externally_to_rlds", 1.0),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
    ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
    ("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0),
    ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
    ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
    ("bc_z", 0.2),
    ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("berkeley_fanuc_manipulation", 2.0),
    ("cmu_stretch", 1.0),
)


def _openvla(mix: Mix, without: tuple[str, ...] = (), also: Mix = ()) -> Mix:
    """OpenVLA's version of an octo mix: its reading of Bridge, and no set that has a wrist camera alone."""
    without = (*without, "nyu_door_opening_surprising_effectiveness")
    kept = tuple(("bridge_orig" if name == "bridge_dataset" else name, w) for name, w in mix if name not in without)
    return kept + also


_MAGIC_SOUP = _openvla(_SOUP, without=("bc_z",))
_PLUS: Mix = (("bc_z", 0.2), ("fmb_dataset", 1.0), ("dobbe", 0.2))

MIXES: dict[str, Mix] = {
    "bridge": (("bridge_dataset", 1.0),),
    "bridge_rt_1": (("bridge_orig", 1.0), ("fractal20220817_data", 1.0)),
    "fractal": (("fractal20220817_data", 1.0),),
    "oxe_simple": (("fractal20220817_data", 1.0), ("bridge_dataset", 1.0)),
    "rtx": _RTX,
    "rtx_openvla": _openvla(_RTX),
    "oxe_magic_soup": _SOUP,
    "magic_soup": _MAGIC_SOUP,
    "magic_soup_plus": (*_MAGIC_SOUP, *_PLUS, ("droid", 0.06)),
    "magic_soup_plus_minus": (
        *((name, 1.0 if name == "fractal20220817_data" else w) for name, w in _MAGIC_SOUP if name != "language_table"),
        *_PLUS,
    ),
    "libero": tuple((f"libero_{suite}_no_noops", 1.0) for suite in ("spatial", "object", "goal", "10")),
}


def find(name: str) -> Mix:
    """The mix of that name; an unknown name is an error that suggests the nearest."""
    if name in MIXES:
        return MIXES[name]
    near = difflib.get_close_matches(name, MIXES, 1)
    raise errors.UserError(
        f"no mix {name!r}" + (f", did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(MIXES)}"
    )


def datasets(name: str, root: str | os.PathLike) -> tuple[data_config.DatasetConfig, ...]:
    """The data sets of a mix as they lie below `root`: ROOT/NAME or ROOT/NAME/VERSION.

    Raises:
      UserError: unknown mix, or folders that are missing or hold no (single) version: all of them in one message.
    """
    mix = find(name)
    root = os.path.abspath(os.path.expanduser(os.fspath(root)))
    found, problems = [], []
    for dataset, weight in mix:
        folder = os.path.join(root, dataset)
        if not os.path.isdir(folder):
            problems.append(f"{dataset}: no folder {folder}{_hint(root, dataset)}")
            continue
        try:
            found.append(data_config.DatasetConfig(path=spec.find_version(folder), name=dataset, weight=weight))
        except errors.UserError as error:
            problems.append(f"{dataset}: {error}")
    if problems:
        raise errors.UserError(
            f"mix {name!r} needs {len(mix)} data sets below {root}; {len(problems)} cannot be used:\n  "
            + "\n  ".join(problems)
        )
    return tuple(found)


def _hint(root: str, dataset: str) -> str:
    """Some readings share their files with another name."""
    twins = {"bridge_orig": "bridge_dataset", "fmb_dataset": "fmb", "bridge_dataset": "bridge_orig"}
    twins |= {f"libero_{suite}_no_noops": f"libero_{suite}" for suite in ("spatial", "object", "goal", "10")}
    twin = twins.get(dataset, "")
    if twin and twin in definitions.DEFINITIONS and os.path.isdir(os.path.join(root, twin)):
        return f" (there is {twin}: link it under this name if it is meant)"
    return ""
