"""An explicit graph of nodes and switches: what every node may send when all exchange with all.

Nodes are called ``node0`` … ; everything else is a switch. Traffic between two nodes takes the
shortest paths there are, in equal parts; the fullest edge says how fast a node may send.
"""

from __future__ import annotations

from typing import Any

from .documents import Block


def read_graph(block: Block, nodes: int) -> Any:
    """The networkx graph of a `graph` block: `switches` with their ports, `links` with their rate.

    Raises:
        ValueError: an unknown end, a link twice, more links than ports, a node that is cut off;
            names the line.
    """
    import networkx as nx

    graph = nx.Graph()
    ports: dict[str, tuple[int, Block]] = {}
    for switch in block.blocks("switches"):
        name = switch.text("name")
        if name in ports or name.startswith("node"):
            raise switch.wrong("name", "a new name that does not begin with 'node'", name)
        ports[name] = (switch.integer("ports"), switch)
        switch.done()
    known = {f"node{i}" for i in range(nodes)} | set(ports)
    for link in block.blocks("links"):
        one, other = link.text("from"), link.text("to")
        for field, end in (("from", one), ("to", other)):
            if end not in known:
                raise link.wrong(field, f"node0 to node{nodes - 1} or a switch", end)
        if one == other or graph.has_edge(one, other):
            raise link.wrong("to", "another end without a link yet (add the rates)", other)
        count = link.integer("count", 1)
        rate = link.number("gb_per_s", above=True) * 1e9 * count
        link.done()
        graph.add_edge(one, other, rate=rate, count=count)
        for end in (one, other):
            used = sum(data["count"] for _, _, data in graph.edges(end, data=True))
            if end in ports and used > ports[end][0]:
                raise ValueError(
                    f"{link.where('from')}: {end} has {ports[end][0]} ports, "
                    f"this link would be number {used}"
                )
    block.done()
    for name in sorted(known - set(ports)):
        if name not in graph or not nx.has_path(graph, "node0", name):
            raise ValueError(f"{block.source}:{block.line}: {name} is not linked to node0")
    return graph


def node_rate(block: Block, nodes: int) -> float:
    """Bytes per second that every node can send at once, spread evenly over the others."""
    import networkx as nx

    graph = read_graph(block, nodes)
    if nodes == 1:
        return float("inf")
    names = [f"node{i}" for i in range(nodes)]
    through = nx.edge_betweenness_centrality_subset(
        graph, sources=names, targets=names, normalized=False
    )
    # Counted once per pair and direction is folded together; a node sends 1 / (N - 1) to each.
    share = {edge: load / (nodes - 1) for edge, load in through.items()}
    return float(min(graph.edges[edge]["rate"] / load for edge, load in share.items() if load > 0))
