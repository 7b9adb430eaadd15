"""MusicGen's decoder in OpenVINO with int8 weights, where OpenVINO is installed (requirements-bench.txt).

The graph is what optimum-intel exports for language models, built here by hand: weights in int8 with a
scale per output, keys and values as the graph's state, which OpenVINO fuses with the attention, and
`beam_idx`, which says the row whose keys and values each row goes on from. So the two prefixes, with and
without condition, are run once and then handed to the rows of all variations. OpenVINO quantizes the
activations while it runs. Keys and values are float16: in int8, its default, steps take a tenth longer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peer_transformers
from child import forget_peak
from peer_loop import measure
from steps import OWN_STEPS, TIMED_STEPS, Missing, PeerRun

if TYPE_CHECKING:
    import torch

NAME = "OpenVINO, int8"


def run(
    variations: int, folder: Path, own_steps: Sequence[int] = OWN_STEPS, timed: int = TIMED_STEPS
) -> PeerRun | Missing:
    """Time prefill and steps for the variations of one track, in this process."""
    try:
        import openvino  # type: ignore[import-not-found, unused-ignore] # noqa: F401
    except ImportError:
        return Missing(
            NAME, variations, "OpenVINO isn't installed here: pip install -r requirements-bench.txt"
        )
    import torch

    began_s = time.perf_counter()
    model = peer_transformers.load(folder)
    with torch.inference_mode():
        prefixes = peer_transformers.prefixes(model, peer_transformers.inputs(folder, 1))
        decoder = OpenVINODecoder(model.decoder)
        del model
        forget_peak()
        load_s = time.perf_counter() - began_s
        return measure(NAME, decoder, prefixes, variations, own_steps=own_steps, timed=timed, load_s=load_s)


class OpenVINODecoder:
    """The decoder of a checkpoint, with keys and values for the variations of one track."""

    def __init__(self, decoder: Any) -> None:
        """`decoder`: transformers.MusicgenMelodyForCausalLM in float32, of which nothing is kept."""
        import openvino
        import torch

        inner, config = decoder.model.decoder, decoder.config
        self.codebooks = config.num_codebooks
        self.position_bytes = 2 * config.num_hidden_layers * config.hidden_size * 2
        self.embeddings = torch.cat([embedding.weight for embedding in inner.embed_tokens])
        self.first = torch.arange(self.codebooks) * (config.vocab_size + 1)  # rows of each codebook
        self.positions = inner.embed_positions.get_embedding(4096, config.hidden_size)
        settings = {"PERFORMANCE_HINT": "LATENCY", "KV_CACHE_PRECISION": "f16"}
        self.request = openvino.Core().compile_model(graph(decoder), "CPU", settings).create_infer_request()

    def prefill(self, prefixes: torch.Tensor, variations: int, steps: int) -> None:
        """See `PeerDecoder`. OpenVINO makes the state longer by itself."""
        self.request.reset_state()
        self.prefix, self.own = prefixes.shape[1], 0
        self._infer(prefixes + self.positions[: self.prefix], np.arange(2))
        self.rows = np.repeat(np.arange(2), variations)  # of the state, that each row goes on from

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `PeerDecoder`."""
        x = self.embeddings[tokens + self.first].sum(1) + self.positions[self.prefix + self.own]
        logits = self._infer(x[:, None], self.rows)
        self.own += 1
        self.rows = np.arange(len(tokens))
        return logits.unflatten(-1, (self.codebooks, -1))

    def move(self, own: int) -> None:
        """See `PeerDecoder`."""
        import openvino

        states = self.request.query_state()
        rows, heads, _, size = states[0].state.shape
        numbers = np.random.default_rng(0).random((rows, heads, self.prefix + own, size), np.float32)
        shared = openvino.Tensor(numbers, shared_memory=True)  # OpenVINO holds it until the next step
        for state in states:
            state.state = shared
        self.own = own

    def _infer(self, x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Logits (rows, codebooks * vocabulary) after the last position of x (rows, positions, hidden)."""
        import torch

        found = self.request.infer({"x": x.numpy(), "beam_idx": rows.astype(np.int32)})
        return torch.from_numpy(found[0])


def graph(decoder: Any) -> Any:
    """openvino.Model of transformers.MusicgenMelodyForCausalLM."""
    import openvino
    from openvino import PartialShape, Type
    from openvino import opset15 as ops
    from openvino.op.util import Variable, VariableInfo

    inner, heads = decoder.model.decoder, decoder.config.num_attention_heads
    hidden, size = decoder.config.hidden_size, decoder.config.hidden_size // heads
    x = named(ops.parameter(PartialShape([-1, -1, hidden]), np.float32), "x")
    rows = named(ops.parameter(PartialShape([-1]), np.int32), "beam_idx")
    first_rows = ops.gather(ops.shape_of(x), ops.constant(np.array([0])), ops.constant(0))
    empty = ops.broadcast(
        ops.constant(np.float32(0)), ops.concat([first_rows, ops.constant(np.array([heads, 0, size]))], 0)
    )
    by_head, by_position = ops.constant(np.array([0, 0, heads, size])), ops.constant(np.array([0, 0, hidden]))
    swapped, sinks = ops.constant(np.array([0, 2, 1, 3])), []

    def cached(new: Any, variable_id: str) -> Any:
        """A new position behind those in the state."""
        info = VariableInfo()
        info.data_shape, info.data_type = PartialShape([-1, heads, -1, size]), Type.f32
        info.variable_id = variable_id
        variable = Variable(info)
        past = ops.gather(ops.read_value(empty, variable), rows, ops.constant(0))
        both = ops.concat([past, new], 2)
        sinks.append(ops.assign(both, variable))
        return both

    y = x
    for index, layer in enumerate(inner.layers):
        attention, normal = layer.self_attn, norm(y, layer.self_attn_layer_norm)
        q, k, v = (
            ops.transpose(ops.reshape(linear(normal, projection), by_head, True), swapped)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = ops.scaled_dot_product_attention(
            q, cached(k, f"keys{index}"), cached(v, f"values{index}"), causal=True
        )
        attended = ops.reshape(ops.transpose(attended, swapped), by_position, True)
        y = ops.add(y, linear(attended, attention.out_proj))
        wide = ops.gelu(linear(norm(y, layer.final_layer_norm), layer.fc1), "erf")
        y = ops.add(y, linear(wide, layer.fc2))
    last = ops.gather(norm(y, inner.layer_norm), ops.constant(-1), ops.constant(1))
    logits = ops.concat([linear(last, head) for head in decoder.lm_heads], -1)
    return openvino.Model([ops.result(logits)], sinks, [x, rows], "decoder")


def linear(x: Any, module: torch.nn.Linear) -> Any:
    """A product with weights in int8, as OpenVINO's compression writes them."""
    from openvino import opset15 as ops

    weights = module.weight.numpy()
    scales = np.abs(weights).max(1, keepdims=True) / 127
    quantized = ops.constant(np.rint(weights / scales).astype(np.int8))
    return ops.matmul(x, ops.multiply(ops.convert(quantized, "f32"), ops.constant(scales)), False, True)


def norm(x: Any, module: torch.nn.LayerNorm) -> Any:
    """Layer normalization."""
    from openvino import opset15 as ops

    normal = ops.mvn(x, ops.constant(np.array([-1])), True, module.eps, "INSIDE_SQRT")
    weight, bias = (ops.constant(part.numpy().copy()) for part in (module.weight, module.bias))
    return ops.add(ops.multiply(normal, weight), bias)


def named(parameter: Any, name: str) -> Any:
    """An input of the graph with a name."""
    parameter.output(0).set_names({name})
    return parameter
