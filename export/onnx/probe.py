"""Every SignAdapter node of a program by itself, in ONNX Runtime with our kernel."""

from collections.abc import Mapping

import onnx
import torch
from onnx import helper
from torch import Tensor

from lordba.adapter import Adapter
from lordba.blob import make_blob
from lordba.runtime.onnx_adapter import INPUT, onnxruntime, with_code
from lordba.scales import ScaleCode

from ..target import Captured, record_inputs, worst_error
from .decoder import AdapterNode, OnnxDecoder
from .op import DOMAIN, IR_VERSION, NAME, OPSET, VERSION, function_body


def node_model(code: ScaleCode, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """A model of one node, y = SignAdapter(x, base, adapter), all of it inputs."""
    kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    kinds = {"x": (kind, 3), "base": (kind, 3), INPUT: (onnx.TensorProto.UINT8, 1)}
    inputs = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in kinds.items()]
    node = helper.make_node(NAME, list(kinds), ["y"], NAME, domain=DOMAIN, module=0)
    output = helper.make_tensor_value_info("y", kind, [None] * 3)
    return helper.make_model(
        helper.make_graph([node], NAME, inputs, [output]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_body(code)],
        ir_version=IR_VERSION,
    )


class OnnxProbe:
    """See target.Probe."""

    def __init__(
        self, captured: Captured, decoder: OnnxDecoder, tokens: Tensor, adapters: Mapping[str, Adapter]
    ) -> None:
        from lordba.backends.onnxruntime import library

        self._adapters = adapters
        self._code = decoder.code
        self._layers: dict[str, AdapterNode] = decoder.nodes
        self._inputs = record_inputs(list(decoder.nodes.values()), captured, tokens)
        runtime = onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library()))
        self._session = runtime.InferenceSession(node_model(self._code).SerializeToString(), options)

    def worst_error(self, name: str) -> float:
        return self.error_of(self._adapters[name], self._adapters[name])

    def error_of(self, adapter: Adapter, given: Adapter) -> float:
        """The worst error against `adapter` if the nodes are given `given`."""
        terms = []
        for path, layer in self._layers.items():
            if path not in given.modules:
                continue
            x = self._inputs[layer]
            module = given.modules[path]
            base = torch.zeros(*x.shape[:-1], module.d_out)
            blob = make_blob([with_code(module, self._code)])
            feeds = {"x": x.numpy(), "base": base.numpy(), INPUT: blob.numpy()}
            terms.append((path, x, torch.from_numpy(self._session.run(None, feeds)[0])))
        return worst_error(terms, adapter)
