"""Adapter nodes that share an input, q/k/v and gate/up, become one: ONNX Runtime does much for a node at every run."""

from collections import defaultdict

import onnx_ir as ir

from lordba.scales import ScaleCode

from .op import DOMAIN, MOST_MODULES, NAME, VERSION, function_bodies, name_of


def join_nodes(model: ir.Model, code: ScaleCode) -> int:
    """Join the SignAdapter nodes of the same x, in their order, as many as one operator takes; names become "a,b,c".

    Returns how many nodes there are now.
    """
    sharing = defaultdict(list)
    for node in model.graph:
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            sharing[node.inputs[0]].append(node)
    groups = [nodes[i : i + MOST_MODULES] for nodes in sharing.values() for i in range(0, len(nodes), MOST_MODULES)]
    for group in groups:
        if len(group) > 1:
            _join(model.graph, group)
    used = {name_of(len(group)) for group in groups if len(group) > 1}
    model.graph.sort()  # a joined node stands behind the last of its bases, before the first that reads from it
    for body in function_bodies(code):
        if body.name in used:
            function = ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function
    return len(groups)


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    outputs = []
    for node in nodes:
        old = node.outputs[0]
        outputs.append(ir.Value(name=old.name, shape=old.shape, type=old.type))
    joined = ir.Node(
        DOMAIN,
        name_of(len(nodes)),
        [nodes[0].inputs[0], *(value for node in nodes for value in node.inputs[1:])],
        list(nodes[0].attributes.values()),
        outputs=outputs,
        name=",".join(str(node.name) for node in nodes),
        version=VERSION,
    )
    graph.insert_before(nodes[0], joined)
    for node, new in zip(nodes, outputs, strict=True):
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        graph.remove(node, safe=True)
