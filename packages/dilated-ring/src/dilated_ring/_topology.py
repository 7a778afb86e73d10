"""Which ranks a call runs on: a process group, or a device mesh of one or two dimensions."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Nodes:
    """The two groups of a rank in a mesh of nodes.

    Attributes:
        across: the ranks with this rank's place in their node, one of each node.
        inside: the ranks of this node.
        size: ranks in a node.
    """

    across: dist.ProcessGroup
    inside: dist.ProcessGroup
    size: int


@dataclass(frozen=True)
class Ring:
    """The ranks that share a sequence, each with the shard of its number.

    Attributes:
        group: all of them.
        rank: the number of this one.
        world_size: how many there are.
        nodes: how they are spread over nodes, or None.
    """

    group: dist.ProcessGroup
    rank: int
    world_size: int
    nodes: Nodes | None = None

    @property
    def node_size(self) -> int | None:
        """Ranks in a node, or None where they are not spread over nodes."""
        return None if self.nodes is None else self.nodes.size

    @property
    def parts(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups of some of its ranks."""
        return () if self.nodes is None else (self.nodes.across, self.nodes.inside)


def find_ring(group: dist.ProcessGroup | DeviceMesh | None) -> Ring | None:
    """The ranks of a `group` argument, or None where one process has the whole sequence.

    Args:
        group: a process group; a mesh of one dimension; a mesh of two, (nodes, ranks of a node),
            whose first name, if it has names, has "node" in it; or None for all ranks. All ranks of
            a mesh must make its first call together.

    Raises:
        TypeError: it is nothing of these.
        ValueError: a mesh has another number of dimensions, or other names; or this process is not
            in the group.
    """
    if group is None:
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD
    nodes = None
    if isinstance(group, DeviceMesh):
        if group.ndim > 2:
            raise ValueError(f"group must be a mesh of 1 or 2 dimensions. Got {group.ndim}.")
        names = group.mesh_dim_names
        if group.ndim == 2 and names is not None and "node" not in names[0]:
            raise ValueError(
                "group must hold the ranks that share a sequence: one dimension of a mesh, as "
                f"mesh[{names[1]!r}], or a mesh of ('nodes', 'ranks'). Got dimensions {names}."
            )
        if group.ndim == 2:
            nodes = Nodes(group.get_group(0), group.get_group(1), group.size(1))
            group = _flat_group(group)
        else:
            group = group.get_group()
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"group must hold this process, rank {dist.get_rank()}. Got what new_group returns to "
            "a rank that is not in the group."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup, a DeviceMesh or None. Got {type(group).__name__}."
        )
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"group must hold this process, rank {dist.get_rank()}. It does not.")
    if nodes is not None and 1 in (nodes.size, world_size // nodes.size):
        nodes = None
    return None if world_size == 1 else Ring(group, rank, world_size, nodes)


def device_of(group: dist.ProcessGroup, like: object) -> torch.device:
    """A device that the group can exchange from: a tensor's, if it can."""
    kinds = [device.type for device in group._device_types]
    if isinstance(like, torch.Tensor) and like.device.type in kinds:
        return like.device
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _flat_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh, row by row."""
    if mesh.mesh.flatten().tolist() == list(range(dist.get_world_size())):
        return _world()
    return mesh._flatten().get_group()


def _world() -> dist.ProcessGroup:
    world: dist.ProcessGroup | None = dist.group.WORLD
    assert world is not None
    return world


def ring_group(ring_size: int) -> dist.ProcessGroup | None:
    """This rank's group where all ranks form rings of `ring_size` neighbours; a collective call.

    Returns:
        The group, or None for a ring of one rank.

    Raises:
        TypeError, ValueError: `ring_size` is no positive int, above or no divisor of world_size.

    Examples:
        >>> print(ring_group(1))  # of one process
        None
    """
    if isinstance(ring_size, bool) or not isinstance(ring_size, int):
        raise TypeError(f"ring_size must be an int. Got {ring_size!r}.")
    if ring_size <= 0:
        raise ValueError(f"ring_size must be positive. Got {ring_size}.")
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ring_size > world_size:
        raise ValueError(f"ring_size must be at most world_size ({world_size}). Got {ring_size}.")
    if world_size % ring_size:
        raise ValueError(f"ring_size must divide world_size ({world_size}). Got {ring_size}.")
    if ring_size == 1:
        return None
    if ring_size == world_size:
        return _world()
    starts = range(0, world_size, ring_size)
    groups = [dist.new_group(list(range(start, start + ring_size))) for start in starts]
    mine: dist.ProcessGroup = groups[dist.get_rank() // ring_size]
    return mine
