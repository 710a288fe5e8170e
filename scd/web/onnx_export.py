"""Write graphs as ONNX, with their weights in float32, float16 or int8.

Arithmetic is in float32 whatever the weights are: smaller ones are widened once, when a runtime
loads the graph and folds its constants.
"""

import logging
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from scd.errors import ScdError
from scd.web.graphs import Graph

Format = Literal["fp32", "fp16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
OPSET = 20
SMALL = 256  # tensors of fewer numbers stay in float32
# Tables of modulation, gathered from row by row; int8 would need a scale for each of their rows.
TABLE = "modulation"


def to_onnx(graph: Graph) -> Any:
    """Translate a graph to an ONNX model, with its weights in float32.

    Raises:
        ScdError: the packages of the extra `web` are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs both)
    except ImportError as error:
        raise ScdError(
            f"web: the package {error.name} is missing: pip install -e '.[web]'"
        ) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            graph.example(),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:], model.metadata_props[:], model.functions[:]
    for node in model.graph.node:  # where each came from in the Python code
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def write_onnx(model: Any, path: Path, weights: Format) -> None:
    """Write an ONNX model to a file that onnxruntime reads."""
    import onnx

    written = onnx.ModelProto()
    written.CopyFrom(model)
    if weights != "fp32":
        _shrink(written.graph, weights)
    onnx.checker.check_model(written)
    path.write_bytes(written.SerializeToString(deterministic=True))


def _shrink(graph: Any, weights: Format) -> None:
    """Store the large float32 constants of a graph as float16 or int8, and widen them in it."""
    from onnx import TensorProto, helper, numpy_helper

    small, widening = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < SMALL:
            small.append(tensor)
            continue
        name, stored = tensor.name, f"{tensor.name}.stored"
        if weights == "fp16" or values.ndim < 2 or TABLE in name:
            small.append(numpy_helper.from_array(values.astype(np.float16), stored))
            widening.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
            continue
        rounded, scale = to_int8(values, _output_axis(graph, name, values.ndim))
        small += [
            numpy_helper.from_array(rounded, stored),
            numpy_helper.from_array(scale, f"{name}.scale"),
        ]
        widening += [
            helper.make_node("Cast", [stored], [f"{name}.wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.wide", f"{name}.scale"], [name]),
        ]
    nodes = [*widening, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(small)
    graph.node.extend(nodes)


def to_int8(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to -127..127 with a scale for each entry of an axis, which broadcasts to the values."""
    others = tuple(number for number in range(values.ndim) if number != axis)
    scale = np.abs(values).max(axis=others, keepdims=True) / 127
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.round(values / scale).astype(np.int8), scale


def _output_axis(graph: Any, name: str, axes: int) -> int:
    """Find the axis of a weight's outputs: the last of a matrix product's, the first of others'."""
    user = next(node for node in graph.node if name in node.input)
    return axes - 1 if user.op_type == "MatMul" else 0
