"""Is the cluster large enough for a run: which resource is lacking, asked for and there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_jobs.config import ScalingConfig

Resources = dict[str, float]


def check(scaling: ScalingConfig) -> None:
    """Refuse to ask for more workers than the cluster can ever hold: Ray would wait for ever.

    Nodes that an autoscaler may add count as there.

    Raises:
        InputError: It is too small.
    """
    import ray

    missing = shortage(scaling)
    if missing is None:
        return
    limit = ray._private.state.state.get_max_resources_from_cluster_config()
    needed = per_worker(scaling)
    if limit and all(
        limit.get(name, 0.0) >= scaling.least * amount for name, amount in needed.items()
    ):
        return
    raise InputError(
        f"{missing}; lower scaling.num_workers or scaling.resources_per_worker, or add nodes"
    )


def shortage(scaling: ScalingConfig) -> str | None:
    """What the nodes lack for the fewest workers a run may have, busy or not; None if nothing."""
    return lacking(scaling.least, per_worker(scaling), list(lasting_nodes().values()))


def lasting_nodes() -> dict[str, Resources]:
    """What each node holds, busy or not, by id; without those about to be taken away."""
    import ray

    draining = draining_nodes()
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    }


def free_nodes() -> dict[str, Resources]:
    """What is free now on each of them."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return {node: dict(free.get(node, {})) for node in lasting_nodes()}


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away."""
    import ray

    if not ray.is_initialized():
        return set()
    return set(ray._private.state.state.get_draining_nodes())


def per_worker(scaling: ScalingConfig) -> Resources:
    """What one worker asks for, as Ray Train reckons it."""
    needed = dict(scaling.resources_per_worker)
    if scaling.use_gpu:
        needed.setdefault("GPU", 1.0)
    elif not needed:
        needed["CPU"] = 1.0
    return {name: amount for name, amount in needed.items() if amount}


def lacking(workers: int, needed: Resources, nodes: Sequence[Resources]) -> str | None:
    """What keeps `workers`, each with `needed`, from fitting on nodes that hold nothing else."""
    room = rooms(needed, nodes)
    if room is None or room >= workers:
        return None
    each = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
    held = "; ".join(
        f"{name}: {amount * workers:g} asked for, {sum(there):g} there, at most {max(there):g} on "
        "one node"
        for name, amount in needed.items()
        for there in [[node.get(name, 0.0) for node in nodes] or [0.0]]
    )
    return (
        f"scaling.num_workers asks for {workers}, each with {each}, but the cluster's "
        f"{len(nodes)} node(s) have room for {room} ({held})"
    )


def rooms(needed: Resources, nodes: Sequence[Resources]) -> int | None:
    """How many workers, each with `needed`, fit on nodes; None where they need nothing."""
    if not needed:
        return None
    return sum(
        min(int(node.get(name, 0.0) / amount) for name, amount in needed.items()) for node in nodes
    )
