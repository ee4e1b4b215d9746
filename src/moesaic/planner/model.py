"""A model as the planner needs it: layers, attention, experts, item sizes.

    H hidden · I expert width · E experts · K top-k

From a Hugging Face ``config.json`` (any MoE family that names its experts in the usual ways) or
from a YAML file of ours, which has a ``moesaic`` field. Dimensions only: no weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..cost import expert_weight_elements
from ..types import ExpertSpec
from .documents import Block, read

ITEMSIZES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
HF_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8"}
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
# Fields of models some of whose layers do not attend.
HYBRID = ("attn_layer_period", "attn_type_list", "conv_L_cache", "linear_num_key_heads",
          "mamba_d_state", "mamba_n_heads")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention's dimensions; GQA where `kv_heads` < `heads`, MLA where `kv_rank` > 0.

    With MLA a token's cache is `kv_rank` + `rope_dim` numbers, whatever the heads.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0

    @property
    def kind(self) -> Literal["MLA", "MHA", "GQA"]:
        """Which of the three this is."""
        if self.kv_rank:
            return "MLA"
        return "MHA" if self.kv_heads == self.heads else "GQA"

    def weights(self, hidden: int) -> int:
        """Elements of the four projections."""
        out = self.heads * self.value_dim * hidden
        if self.kv_rank:
            q = (
                hidden * self.q_rank + self.q_rank * self.heads * self.head_dim
                if self.q_rank
                else hidden * self.heads * self.head_dim
            )
            down = hidden * (self.kv_rank + self.rope_dim)
            up = self.kv_rank * self.heads * (self.head_dim - self.rope_dim + self.value_dim)
            return q + down + up + out
        return hidden * (self.heads + self.kv_heads) * self.head_dim + (
            hidden * self.kv_heads * self.value_dim + out
        )

    def cache_elements(self) -> int:
        """Numbers kept per token and layer."""
        if self.kv_rank:
            return self.kv_rank + self.rope_dim
        return self.kv_heads * (self.head_dim + self.value_dim)

    def products(self, hidden: int, tp: int, *, absorbed: bool) -> list[tuple[float, float]]:
        """Columns and inner width of every projection on one of `tp` GPUs that divide the heads.

        MLA's way down to its compressed vectors has no heads and is done on every GPU; `absorbed`
        takes queries and values through the compressed cache's width head by head, as one product.
        """
        heads, out = self.heads / tp, self.heads / tp * self.value_dim
        if not self.kv_rank:
            kept = self.kv_heads / min(tp, self.kv_heads) * (self.head_dim + self.value_dim)
            return [(heads * self.head_dim + kept, hidden), (hidden, out)]
        down = self.kv_rank + self.rope_dim
        found: list[tuple[float, float]] = [(self.q_rank + down, hidden)]
        if self.q_rank:
            found.append((heads * self.head_dim, self.q_rank))
        else:
            found = [(heads * self.head_dim + down, hidden)]
        plain = self.head_dim - self.rope_dim
        if absorbed:
            found += [(heads * self.kv_rank, plain), (out, self.kv_rank)]
        else:
            found.append((heads * (plain + self.value_dim), self.kv_rank))
        return [*found, (hidden, out)]

    def core_flops(self, pairs: float, *, absorbed: bool) -> float:
        """Flops of scores and values for `pairs` of a query and a cached token.

        Args:
            pairs: query tokens times the tokens each attends to.
            absorbed: MLA on the compressed cache, as decode does it.
        """
        if self.kv_rank and absorbed:
            return 2.0 * pairs * self.heads * (2 * self.kv_rank + self.rope_dim)
        return 2.0 * pairs * self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only model; `dense_layers` come first, the others have experts."""

    name: str
    layers: int
    dense_layers: int
    hidden: int
    dense_intermediate: int
    vocab: int
    attention: Attention
    experts: ExpertSpec
    top_k: int
    shared_experts: int = 0
    shared_intermediate: int = 0
    dtype: str = "bf16"
    cache_dtype: str = "bf16"
    n_group: int = 1
    topk_group: int = 1

    @property
    def moe_layers(self) -> int:
        """Layers that have experts."""
        return self.layers - self.dense_layers

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return ITEMSIZES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer."""
        return expert_weight_elements(self.experts) * self.itemsize

    @property
    def attention_bytes(self) -> int:
        """Bytes of one layer's projections."""
        return self.attention.weights(self.hidden) * self.itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache per token and layer."""
        return self.attention.cache_elements() * ITEMSIZES[self.cache_dtype]

    def mlp_elements(self, intermediate: int) -> int:
        """Elements of a dense MLP of this width, in the experts' arithmetic."""
        if self.experts.layers == 3:
            return 2 * self.hidden * intermediate + intermediate * intermediate
        return self.hidden * intermediate * (3 if self.experts.gated else 2)

    @property
    def parameters(self) -> int:
        """All weights: embeddings, attention, dense, shared and routed experts."""
        h = self.hidden
        per_moe = (
            self.experts.num_experts * expert_weight_elements(self.experts)
            + self.shared_experts * self.mlp_elements(self.shared_intermediate)
            + h * self.experts.num_experts
        )
        return (
            2 * self.vocab * h
            + self.layers * self.attention.weights(h)
            + self.dense_layers * self.mlp_elements(self.dense_intermediate)
            + self.moe_layers * per_moe
        )


def load_model(path: str | Path) -> Model:
    """A model from a file (a folder: its config.json).

    Raises:
        OSError: the file is missing.
        ValueError: a field that is missing, unknown or impossible; names the line.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    block = read(file)
    return _ours(block) if "moesaic" in block else _hugging_face(block, file)


def _checked(block: Block, model: Model, layers_field: str, k_field: str) -> Model:
    if model.dense_layers >= model.layers:
        raise block.wrong(layers_field, f"more than the {model.dense_layers} dense layers",
                          model.layers)  # fmt: skip
    if not 1 <= model.top_k <= model.experts.num_experts:
        raise block.wrong(k_field, f"in [1, {model.experts.num_experts}], the experts",
                          model.top_k)  # fmt: skip
    heads = model.attention
    if heads.heads % heads.kv_heads:
        raise ValueError(
            f"{block.source}:{block.line}: {heads.heads} heads do not divide into "
            f"{heads.kv_heads} key-value heads"
        )
    if model.experts.num_experts % model.n_group:
        raise ValueError(
            f"{block.where('n_group')}: {model.experts.num_experts} experts do not divide into "
            f"{model.n_group} groups"
        )
    return model


def _spec(block: Block, fields: tuple[str, str, str], **values: Any) -> ExpertSpec:
    """The experts; a complaint points at the field that holds the width."""
    try:
        return ExpertSpec(**values)
    except ValueError as error:
        what = str(error)
        field = next((f for f, word in zip(fields, ("num_experts", "hidden_size",
                      "intermediate_size"), strict=True) if what.startswith(word)),
                     fields[0])  # fmt: skip
        raise ValueError(f"{block.where(field)}: {what}") from error


def _ours(block: Block) -> Model:
    block.integer("moesaic", low=1, high=1)
    inner = block.block("attention", required=True)
    experts = block.block("experts", required=True)
    assert inner is not None and experts is not None
    heads = inner.integer("heads")
    dim = inner.integer("head_dim")
    attention = Attention(
        heads=heads,
        kv_heads=inner.integer("kv_heads", heads),
        head_dim=dim,
        value_dim=inner.integer("value_dim", dim),
        q_rank=inner.integer("q_rank", 0, low=0),
        kv_rank=inner.integer("kv_rank", 0, low=0),
        rope_dim=inner.integer("rope_dim", 0, low=0),
    )
    inner.done()
    hidden = block.integer("hidden")
    width = experts.integer("intermediate")
    spec = _spec(
        experts, ("count", "count", "intermediate"),
        num_experts=experts.integer("count"), hidden_size=hidden, intermediate_size=width,
        gated=experts.boolean("gated", True), layers=experts.integer("layers", 2, low=2, high=3),
        activation=experts.text("activation", "silu"),
    )  # fmt: skip
    model = Model(
        name=block.text("name"),
        layers=block.integer("layers"),
        dense_layers=block.integer("dense_layers", 0, low=0),
        hidden=hidden,
        dense_intermediate=block.integer("dense_intermediate", 4 * hidden),
        vocab=block.integer("vocab", 32000),
        attention=attention,
        experts=spec,
        top_k=experts.integer("top_k"),
        shared_experts=experts.integer("shared", 0, low=0),
        shared_intermediate=experts.integer("shared_intermediate", width),
        dtype=block.text("dtype", "bf16", among=tuple(ITEMSIZES)),
        cache_dtype=block.text("cache_dtype", "bf16", among=tuple(ITEMSIZES)),
    )
    experts.done()
    block.done()
    return _checked(block, model, "layers", "experts")


def _first(block: Block, names: tuple[str, ...], what: str) -> str:
    for name in names:
        if name in block:
            return name
    raise ValueError(
        f"{block.source}:{block.line}: no {what} ({', '.join(names)}); is this a MoE model?"
    )


def _hugging_face(block: Block, file: Path) -> Model:
    """What the usual names say; fields that the planner does not need are left alone."""
    nested = block.block("text_config")
    if nested is not None:
        block = nested
    count = _first(block, EXPERT_COUNTS, "number of experts")
    top_k = _first(block, ("num_experts_per_tok", "num_experts_per_token", "moe_top_k"), "top-k")
    hidden, heads = block.integer("hidden_size"), block.integer("num_attention_heads")
    dense = block.integer("intermediate_size", 4 * hidden)
    width_field = "moe_intermediate_size" if "moe_intermediate_size" in block else (
        "intermediate_size"
    )  # fmt: skip
    width = block.integer(width_field)
    layers = block.integer("num_hidden_layers")
    _only_attention(block)
    method = _quant_method(block)
    dtype_field = "torch_dtype" if "torch_dtype" in block else "dtype"
    dtype = HF_DTYPES.get(block.text(dtype_field, "bfloat16"), "bf16")
    shared = block.integer("n_shared_experts", 0, low=0) or 0
    shared_width = block.integer("shared_expert_intermediate_size", None)
    shared_width = shared_width or block.integer("shared_intermediate_size", None, low=0)
    family = block.text("model_type", "")
    if family.startswith("llama4"):
        shared, dense = 1, block.integer("intermediate_size_mlp")
    spec = _spec(
        block, (count, "hidden_size", width_field),
        num_experts=block.integer(count), hidden_size=hidden, intermediate_size=width,
    )  # fmt: skip
    return _checked(
        block,
        Model(
            name=f"{family or file.parent.name}-{layers}x{spec.num_experts}",
            layers=layers,
            dense_layers=_dense_layers(block, layers),
            hidden=hidden,
            dense_intermediate=dense,
            vocab=block.integer("vocab_size", 32000),
            attention=_hf_attention(block, hidden, heads),
            experts=spec,
            top_k=block.integer(top_k),
            shared_experts=shared or (1 if shared_width else 0),
            shared_intermediate=shared_width or width,
            dtype="fp8" if method == "fp8" else dtype,
            n_group=block.integer("n_group", 1) or 1,
            topk_group=block.integer("topk_group", 1) or 1,
        ),
        "num_hidden_layers",
        top_k,
    )


def _only_attention(block: Block) -> None:
    """Refuse models with layers that do not attend: their state and kernels are not modelled."""
    for name in HYBRID:
        if name in block:
            raise ValueError(
                f"{block.where(name)}: {name} is of a model whose layers do not all attend; the "
                "planner knows attention alone"
            )
    if "layer_types" in block and block.is_list("layer_types"):
        block.texts("layer_types", among=ATTENDING)


def _quant_method(block: Block) -> str | None:
    """How the weights are quantized; only eight-bit ones are known."""
    quantized = block.block("quantization_config")
    if quantized is None:
        return None
    method: str | None = quantized.text("quant_method", None)
    if method not in (None, "fp8"):
        raise quantized.wrong(
            "quant_method", "fp8 (else write YAML of ours, with the dtype it runs in)", method
        )
    return method


def _dense_layers(block: Block, layers: int) -> int:
    """How many layers have no experts."""
    named = "mlp_only_layers"
    listed = block.is_list(named) and block.length(named) if named in block else 0
    if "num_dense_layers" in block:
        return int(block.integer("num_dense_layers", 0, low=0) or 0)
    every = "interleave_moe_layer_step"
    step = block.integer(every if every in block else "decoder_sparse_step", 1, low=1) or 1
    first = block.integer("first_k_dense_replace", 0, low=0) or 0
    return int(listed) + (int(first) if step == 1 else layers - layers // step)


def _hf_attention(block: Block, hidden: int, heads: int) -> Attention:
    if "kv_lora_rank" in block:
        nope, rope = block.integer("qk_nope_head_dim"), block.integer("qk_rope_head_dim")
        return Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=nope + rope,
            value_dim=block.integer("v_head_dim"),
            q_rank=block.integer("q_lora_rank", 0, low=0) or 0,
            kv_rank=block.integer("kv_lora_rank"),
            rope_dim=rope,
        )
    dim = block.integer("head_dim", None) or hidden // heads
    return Attention(
        heads=heads,
        kv_heads=block.integer("num_key_value_heads", heads) or heads,
        head_dim=dim,
        value_dim=dim,
    )
