"""Silero's packaged network as onnxruntime likes it best: matrix products over many frames, then its recurrence.

The package's `silero_vad_16k_sequence.onnx` computes all frames of a block as convolutions of four positions each,
for which onnxruntime has no fast path: 47 us a frame, 40 of them there. A frame's spectrum and its four convolutions
are written here as five matrices, the zeros of their padding included, from the weights in that file: about as much
arithmetic in less than a third of the time, 14 us a frame, 4 of them the recurrence. Probabilities differ by 1e-6.

onnxruntime takes a graph only in ONNX's form, which is protobuf; the package `onnx` would be a dependency for the
forty lines of it that are needed, so they are here. This module knows frames of samples, not audio or speech.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

Array = NDArray[np.float32]
State = tuple[Array, Array]  # the recurrence's h and c, [1, 1, 128] each

FRAME = 576  # samples of a frame with the 64 before it
_COLUMNS, _N_FFT, _HOP = 4, 256, 128  # a frame's spectra: at 0, 128, 256 and 384, the last one reflected at the end
_BINS = _N_FFT // 2 + 1
_HIDDEN = 128
_PIECE = 128  # frames a call: their 0.5 MB of spectra stay in a core's cache (1,024 at once are 15 % slower)

MODEL = "silero_vad_16k_sequence.onnx"

# The tensors of that file, and their shapes in the network we know.
_SHAPES: dict[str, tuple[int, ...]] = {
    "stft.forward_basis_buffer": (2 * _BINS, 1, _N_FFT),
    "encoder.0.weight": (128, _BINS, 3),
    "encoder.0.bias": (128,),
    "encoder.1.weight": (64, 128, 3),
    "encoder.1.bias": (64,),
    "encoder.2.weight": (64, 64, 3),
    "encoder.2.bias": (64,),
    "encoder.3.weight": (128, 64, 3),
    "encoder.3.bias": (128,),
    "lstm.input": (1, 4 * _HIDDEN, 128),
    "lstm.recurrent": (1, 4 * _HIDDEN, _HIDDEN),
    "lstm.bias": (1, 8 * _HIDDEN),
    "output.weight": (1, _HIDDEN, 1),
    "output.bias": (1,),
}


def fresh_state() -> State:
    return np.zeros((1, 1, _HIDDEN), np.float32), np.zeros((1, 1, _HIDDEN), np.float32)


def probabilities(frames: Array, state: State) -> tuple[Array, State]:
    """Speech probability of consecutive frames [n, FRAME], each with its context: [n], and the state after them."""
    found = [np.zeros(0, np.float32)]
    for at in range(0, len(frames), _PIECE):
        columns = _columns(frames[at : at + _PIECE])
        probability, *after = _session().run(None, {"columns": columns, "h": state[0], "c": state[1]})
        found.append(probability[:, 0])
        state = (after[0], after[1])
    return np.concatenate(found), state


def _columns(frames: Array) -> Array:
    """The samples that each spectrum is taken of, [4 n, 256]."""
    columns = np.empty((len(frames), _COLUMNS, _N_FFT), np.float32)
    columns[:, :3] = np.lib.stride_tricks.sliding_window_view(frames, _N_FFT, axis=1)[:, : 3 * _HOP : _HOP]
    columns[:, 3, :192] = frames[:, 3 * _HOP :]
    columns[:, 3, 192:] = frames[:, FRAME - 2 : FRAME - 66 : -1]
    return columns.reshape(-1, _N_FFT)


@cache
def _session() -> Any:
    """One onnxruntime session a process, on one thread; `run` may be called from any thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(_graph(_weights()), options, providers=["CPUExecutionProvider"])


# -- the network ---------------------------------------------------------------------------------------------


def _graph(w: Mapping[str, Array]) -> bytes:
    """The network in ONNX's form: columns [4 n, 256], h, c → probability [n, 1], hn, cn."""
    basis = np.ascontiguousarray(w["stft.forward_basis_buffer"][:, 0].T)
    dense = [
        _dense(w, "encoder.0", n_in=4, stride=1),
        _dense(w, "encoder.1", n_in=4, stride=2),
        _dense(w, "encoder.2", n_in=2, stride=2),
        _dense(w, "encoder.3", n_in=1, stride=1),
    ]
    nodes = [
        _node("MatMul", "columns cosines", "real"),
        _node("MatMul", "columns sines", "imaginary"),
        _node("Mul", "real real", "real2"),
        _node("Mul", "imaginary imaginary", "imaginary2"),
        _node("Add", "real2 imaginary2", "power"),
        _node("Sqrt", "power", "magnitude"),
        _node("Reshape", "magnitude by_frame", "x0"),
    ]
    tensors = {
        "cosines": basis[:, :_BINS],
        "sines": basis[:, _BINS:],
        "by_frame": np.array([-1, _COLUMNS * _BINS], np.int64),
        "time_first": np.array([-1, 1, _HIDDEN], np.int64),
        "flat": np.array([-1, _HIDDEN], np.int64),
        "W": w["lstm.input"],
        "R": w["lstm.recurrent"],
        "B": w["lstm.bias"],
        "out": w["output.weight"][0],
        "out_bias": w["output.bias"],
    }
    for i, (matrix, bias) in enumerate(dense):
        tensors |= {f"w{i}": matrix, f"b{i}": bias}
        nodes += [_node("Gemm", f"x{i} w{i} b{i}", f"y{i}"), _node("Relu", f"y{i}", f"x{i + 1}")]
    nodes += [
        _node("Reshape", "x4 time_first", "heard"),
        _node("LSTM", ["heard", "W", "R", "B", "", "h", "c"], "remembered hn cn", hidden_size=_HIDDEN),
        _node("Reshape", "remembered flat", "state"),
        _node("Relu", "state", "spoken"),
        _node("Gemm", "spoken out out_bias", "logit"),
        _node("Sigmoid", "logit", "probability"),
    ]
    memory = (1, 1, _HIDDEN)
    return _model(
        nodes,
        tensors,
        inputs={"columns": ("n_columns", _N_FFT), "h": memory, "c": memory},
        outputs={"probability": ("n_frames", 1), "hn": memory, "cn": memory},
    )


def _dense(w: Mapping[str, Array], name: str, n_in: int, stride: int) -> tuple[Array, Array]:
    """A convolution of width 3, padded by 1, over `n_in` positions as one matrix and its bias."""
    kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    c_out, c_in, width = kernel.shape
    n_out = -(-n_in // stride)
    matrix = np.zeros((n_in, c_in, n_out, c_out), np.float32)
    for at in range(n_out):
        for tap in range(width):
            source = at * stride + tap - 1
            if 0 <= source < n_in:
                matrix[source, :, at] = kernel[:, :, tap].T
    return matrix.reshape(n_in * c_in, n_out * c_out), np.tile(bias, n_out)


def _weights() -> dict[str, Array]:
    """The packaged file's tensors. Raises `ConfigError` where it is missing or another network."""
    path = model_path()
    try:
        found = _initializers(path.read_bytes())
    except (IndexError, KeyError, ValueError):  # no ONNX file, or a damaged one
        found = {}
    # The exporter numbered the recurrence's three.
    lstm = sorted(name for name in found if name.startswith("onnx::LSTM_"))
    names = ("lstm.input", "lstm.recurrent", "lstm.bias")
    found |= {ours: found[theirs] for ours, theirs in zip(names, lstm, strict=False)}
    if any(name not in found or found[name].shape != shape for name, shape in _SHAPES.items()):
        raise ConfigError(
            f"vad: the {MODEL} of this silero-vad is another network than 6.2's; install 6.2, or use none"
        )
    return found


def model_path() -> Path:
    """The file inside the `silero_vad` package, found without importing it: it would import torch."""
    spec = find_spec("silero_vad")
    path = Path(spec.origin).parent / "data" / MODEL if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise ConfigError(f"vad: silero needs the package silero-vad with its {MODEL} (6.2.2 or newer), or use none")
    return path


# -- ONNX's form: protobuf, of which a message is a list of (field number, whole number or bytes) -----------------

_GRAPH, _INITIALIZER, _DIMS, _NAME, _RAW = 7, 5, 1, 8, 9
_FLOAT, _INT64 = 1, 7  # element types


def _initializers(model: bytes) -> dict[str, Array]:
    """The float tensors of an ONNX model's graph by name."""
    graph = dict(_fields(memoryview(model)))[_GRAPH]
    tensors: dict[str, Array] = {}
    for number, value in _fields(graph):
        if number == _INITIALIZER:
            parts = list(_fields(value))
            shape = [int(part) for field, part in parts if field == _DIMS]
            rest = dict(parts)
            tensors[bytes(rest[_NAME]).decode()] = np.frombuffer(rest[_RAW], np.float32).reshape(shape)
    return tensors


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 == 0:
            value, at = _read_varint(message, at)
            yield key >> 3, value
        else:  # a length and as many bytes, or four or eight bytes
            size, at = _read_varint(message, at) if key & 7 == 2 else ({5: 4, 1: 8}[key & 7], at)
            yield key >> 3, message[at : at + size]
            at += size


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] > 127:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, values: NDArray[Any]) -> bytes:
    kind = _INT64 if values.dtype == np.int64 else _FLOAT
    dims = b"".join(_field(_DIMS, size) for size in values.shape)
    return dims + _field(2, kind) + _field(_NAME, name) + _field(_RAW, np.ascontiguousarray(values).tobytes())


def _node(op: str, inputs: str | list[str], outputs: str, **attributes: int) -> bytes:
    """Names in a string are divided by spaces; "" in a list is an input that is left out."""
    names = inputs.split() if isinstance(inputs, str) else inputs
    parts = [_field(1, name) for name in names] + [_field(2, name) for name in outputs.split()] + [_field(4, op)]
    parts += [_field(5, _field(1, name) + _field(3, value) + _field(20, 2)) for name, value in attributes.items()]
    return b"".join(parts)


def _value(name: str, shape: tuple[int | str, ...]) -> bytes:
    """A float input or output; a size that is a name may differ from call to call."""
    dims = b"".join(_field(1, _field(1 if isinstance(size, int) else 2, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, dims)))


def _model(
    nodes: list[bytes],
    tensors: Mapping[str, NDArray[Any]],
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Mapping[str, tuple[int | str, ...]],
) -> bytes:
    graph = [_field(1, node) for node in nodes] + [_field(2, "silero")]
    graph += [_field(_INITIALIZER, _tensor(name, values)) for name, values in tensors.items()]
    graph += [_field(11, _value(name, shape)) for name, shape in inputs.items()]
    graph += [_field(12, _value(name, shape)) for name, shape in outputs.items()]
    ir_version, opset = _field(1, 8), _field(8, _field(1, "") + _field(2, 17))
    return ir_version + opset + _field(_GRAPH, b"".join(graph))
