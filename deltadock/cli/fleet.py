"""`deltadock ps`: the inference nodes, and what is resident where."""

from deltadock.cli.output import AsJson, age, figure, print_resources, print_table
from deltadock.cli.server import Url, connect


def ps(as_json: AsJson = False, url: Url = None) -> None:
    """Show the nodes, and the deltas in their memory and on their disks."""
    from deltadock.client.resources import size_text

    with connect(url) as client:
        nodes = client.nodes()
    if as_json:
        print_resources(nodes)
        return
    print_table(
        ("node", "state", "base", "sequences", "slots used", "tokens/s", "memory", "seen"),
        (
            (
                node.url,
                node.state,
                node.base_name or ("–" if node.base is None else node.base[:12]),
                f"{node.admitted} of {node.capacity}",
                f"{node.held.get('device', 0)} of {node.delta_slots}",
                figure(node.usage.tokens_per_second if node.usage else None, ".1f"),
                size_text(memory) if (memory := node.usage and node.usage.memory_bytes) else "–",
                age(node.seen_at),
            )
            for node in nodes
        ),
        "No node runs: nothing can be generated. `deltadock up` starts one, or `deltadock node`.",
    )
    held = [(node, delta) for node in nodes for delta in node.deltas]
    if held:
        print_table(
            ("delta", "where", "tier", "size", "requests", "pinned"),
            (
                (
                    ", ".join(delta.names) or delta.artifact[:12],
                    node.url,
                    delta.tier,
                    size_text(delta.bytes),
                    str(delta.references),
                    "yes" if delta.pinned else "no",
                )
                for node, delta in held
            ),
            "",
        )
