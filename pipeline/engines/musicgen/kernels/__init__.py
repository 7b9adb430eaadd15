"""The arithmetic of the decoder on a CPU, compiled by numba on first use.

Everything rests on one micro-kernel (`tile`, on AMX `amx`). `products` and `attention` are built on it,
`run` puts them together and shares the work between threads (`phases`).

There are three kinds of numbers, told apart by the type of the weights:
- float32: plain sums of products.
- uint8, for the model's int8 weights: one scale per output, and int8 activations with a scale per row and
  group of inputs, 128 at most. Products are added as integers within a group, groups in float32.
- int8, for keys and values: int16 queries and softmax weights, as reading keys and values takes the time.

The sums of a row are added in one order whatever other rows are in the batch, so a result depends neither on
its neighbours nor on the number of threads: that makes variations reproducible in any batch.
"""

from pipeline.engines.musicgen.kernels.amx import AMX
from pipeline.engines.musicgen.kernels.attention import Attended, AttentionScratch, KeysValues
from pipeline.engines.musicgen.kernels.packing import aligned, pack_columns, quantize_rows
from pipeline.engines.musicgen.kernels.processor import LANES, ROW_BLOCK
from pipeline.engines.musicgen.kernels.products import (
    ADD,
    GELU,
    LARGEST_GROUP,
    STORE,
    PackedRows,
    Product,
    ProductScratch,
)
from pipeline.engines.musicgen.kernels.run import (
    LayerBuffers,
    Layers,
    product_counters,
    run_layers,
    run_product,
)
