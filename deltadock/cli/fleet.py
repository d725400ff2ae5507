"""`deltadock ps`, `drain`, `resume` and `evict`: inference nodes, and what is resident where."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from deltadock import words
from deltadock.cli.output import AsJson, print_resources, print_table, say
from deltadock.cli.server import Reference, Url, complete_node, connect
from deltadock.errors import NotFound

if TYPE_CHECKING:
    from deltadock.client.blocking import Client
    from deltadock.client.resources import Node

NODE_HELP = "The node's address or id, as `deltadock ps` and `ps --json` show them."
NodeReference = Annotated[
    str, typer.Argument(metavar="NODE", help=NODE_HELP, autocompletion=complete_node)
]
OneNode = Annotated[
    str | None,
    typer.Option("--node", help=f"Only from this node. {NODE_HELP}", autocompletion=complete_node),
]


def ps(as_json: AsJson = False, url: Url = None) -> None:
    """Show the nodes, and the deltas in their memory."""
    with connect(url) as client:
        nodes = client.nodes()
    if as_json:
        print_resources(nodes)
        return
    columns = ["node", "state", "base"]
    rows = [[node.address, node.state, _base(node)] for node in nodes]
    if any(node.url is not None for node in nodes):  # the operator's tenant asks
        columns += ["sequences", "slots used", "tokens/s", "memory", "seen"]
        for node, row in zip(nodes, rows, strict=True):
            memory = node.usage and node.usage.memory_bytes
            row += [
                f"{node.admitted} of {node.capacity}",
                f"{node.held.get('device', 0)} of {node.delta_slots}",
                words.significant(node.usage.tokens_per_second if node.usage else None),
                words.size(memory or None),
                words.ago(node.seen_at),
            ]
    print_table(
        columns,
        rows,
        "No node can answer. `deltadock up` starts one, or `deltadock node`.",
    )
    held = [(node, delta) for node in nodes for delta in node.deltas if delta.tier != "disk"]
    if held:
        print_table(
            ("delta", "where", "tier", "size", "in flight", "pinned"),
            (
                (
                    ", ".join(delta.names) or delta.artifact[:12],
                    node.address,
                    delta.tier,
                    words.size(delta.bytes),
                    str(delta.references),
                    "yes" if delta.pinned else "no",
                )
                for node, delta in held
            ),
            "",
        )
    if on_disk := sum(len(node.deltas) for node in nodes) - len(held):
        say(f"On disk only: {words.counted(on_disk, 'delta')}; --json lists them.")


def _base(node: "Node") -> str:
    if node.base is None:
        return "any, on request" if node.adopts else words.MISSING
    return node.base_name or node.base[:12]


def drain(node: NodeReference, as_json: AsJson = False, url: Url = None) -> None:
    """Let a node finish its requests and accept no others, until it is resumed or starts again."""
    with connect(url) as client:
        found = _node(client.nodes(), node)
        client.drain(found.id)
        text = f"{found.address} accepts no more requests. Undo: deltadock resume {node}"
        _show(client, found, text, as_json=as_json)


def resume(node: NodeReference, as_json: AsJson = False, url: Url = None) -> None:
    """Let a drained node accept requests again."""
    with connect(url) as client:
        found = _node(client.nodes(), node)
        client.resume(found.id)
        _show(client, found, f"{found.address} accepts requests.", as_json=as_json)


def evict(name: Reference, node: OneNode = None, as_json: AsJson = False, url: Url = None) -> None:
    """Remove a delta from the nodes' slots and host memory; its next request loads it again.

    Its file stays on their disks. Another tenant's is named by its digest, as `ps` shows it.
    """
    with connect(url) as client:
        nodes = client.nodes()
        artifact = _artifact(client, nodes, name)
        freed = []
        for one in nodes if node is None else [_node(nodes, node)]:
            with suppress(NotFound):  # this node does not have it in memory
                client.evict(one.id, artifact)
                freed.append(one)
    if not freed:
        raise NotFound(f"No node has {name} in memory. `deltadock ps` shows what they have.")
    if as_json:
        print_resources(freed)
    else:
        say(f"{name} is removed from the memory of {', '.join(one.address for one in freed)}.")


def _node(nodes: "Sequence[Node]", reference: str) -> "Node":
    """The node with this address, with or without its scheme, or this id."""
    for node in nodes:
        if reference.rstrip("/") in (node.id, node.url, node.address.partition("://")[2]):
            return node
    known = ", ".join(node.address for node in nodes) or "none"
    raise NotFound(f"There is no node {reference!r}. Those that run: {known}.")


def _artifact(client: "Client", nodes: "Sequence[Node]", name: str) -> str:
    """The digest of the artifact that a name means, or that begins with it on a node."""
    for node in nodes:
        for delta in node.deltas:
            if len(name) >= 12 and delta.artifact.startswith(name):
                return delta.artifact
    return client.resolve(name).digest


def _show(client: "Client", node: "Node", text: str, *, as_json: bool) -> None:
    if as_json:
        print_resources(_node(client.nodes(), node.id))
    else:
        say(text)
