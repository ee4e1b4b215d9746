"""Input files: what is read from them, and one complaint with its line when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.planner.cluster import Cluster, cluster_from, load_cluster
from moesaic.planner.documents import parse
from moesaic.planner.model import Model, load_model
from moesaic.planner.workload import Workload, workload_from
from moesaic.trace import TraceInfo, TraceWriter

CLUSTER = """\
name: small
nodes: 2
gpus_per_node: 8
gpu:
  tflops: 400
  mfu: 0.6
  memory_gb: 64
  bandwidth_tb_per_s: 1.8
  bandwidth_efficiency: 0.8
nvlink: {gb_per_s: 200}
network: {nics: 8, gb_per_s: 50}
"""
MODEL = """\
moesaic: 1
name: tiny
layers: 4
dense_layers: 1
hidden: 512
attention: {heads: 8, head_dim: 64}
experts: {count: 16, top_k: 2, intermediate: 1024}
"""
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "torch_dtype": "bfloat16", "rope_theta": 1e6,
}  # fmt: skip


def cluster(text: str, folder: Path = Path()) -> Cluster:
    return cluster_from(parse(text, "c.yaml"), folder)


def model(text: str, tmp_path: Path) -> Model:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    return load_model(path)


def workload(text: str, folder: Path = Path()) -> Workload:
    return workload_from(parse(text, "w.yaml"), folder, num_experts=16, layers=3)


def test_a_cluster_file_means_what_it_says() -> None:
    found = cluster(CLUSTER)
    assert found.gpus == 16 and found.gpu.rate(2) == pytest.approx(240e12)
    assert found.gpu.read_bytes_per_s == pytest.approx(1.44e12)
    assert found.network is not None and found.network.at(2)[0] == pytest.approx(48e9)
    assert found.network.at(8)[0] < 48e9 and found.network.at(8)[1] > found.network.at(2)[1]
    assert found.topology(16).ranks == 16 and found.topology(4).nodes == 1
    with pytest.raises(ValueError, match="a group of 12 GPUs"):
        found.topology(12)


def test_presets_and_overrides() -> None:
    assert load_cluster("H200x4").gpus == 32
    over = cluster("preset: H100\nnodes: 2\ngpu: {mfu: 0.5}\nnetwork: {nics: 4, gb_per_s: 100}\n")
    assert over.gpu.mfu == 0.5 and over.gpu.memory_bytes == 80e9
    assert over.network is not None and over.network.nics == 4
    with pytest.raises(FileNotFoundError, match=r"H300x4 is neither a file nor a preset \(H200, "):
        load_cluster("H300x4")


LEVELS = "[{nodes: 4, oversubscription: 2}, {nodes: 16, oversubscription: 8, latency_us: 5}]"


def test_levels_narrow_what_leaves_a_group() -> None:
    text = CLUSTER.replace("nodes: 2", "nodes: 64")
    flat = cluster(text).network
    deep = cluster(text.replace("gb_per_s: 50}", f"gb_per_s: 50, levels: {LEVELS}}}")).network
    assert flat is not None and deep is not None
    assert deep.at(4) == flat.at(4)
    # Of 8 nodes a node sends 4/7 out of its group of 4, over half of the bandwidth.
    assert deep.at(8)[0] == pytest.approx(min(flat.at(8)[0], 48e9 / 2 * 7 / 4))
    assert deep.at(64)[0] == pytest.approx(48e9 / 8 * 63 / 48)
    assert deep.at(64)[1] == pytest.approx(flat.at(64)[1] + 5e-6)


BAD_CLUSTERS = [
    ("gb_per_s: 50", "gb_per_s: 50, levels: [{nodes: 1, oversubscription: 2}]", r":11: nodes must"),
    ("gb_per_s: 50", "gb_per_s: 50, levels: [{nodes: 2, oversubscription: 0.5}]", r":11: oversub"),
    ("nodes: 2", "nods: 2", r"c\.yaml:1: nodes is missing|c\.yaml:2: unknown field 'nods'"),
    ("tflops: 400", "tflops: 0", r"c\.yaml:5: tflops must be a number in \(0, inf\], got '0'"),
    ("mfu: 0.6", "mfu: 1.6", r"c\.yaml:6: mfu must be a number in \(0, 1\], got '1\.6'"),
    ("mfu: 0.6", "mfu: fast", r"c\.yaml:6: mfu must be"),
    ("1.8", "0", r"c\.yaml:8: bandwidth_tb_per_s must be"),
    ("{gb_per_s: 200}", "{gb_per_s: 0}", r"c\.yaml:10: gb_per_s must be"),
    ("nics: 8", "nics: 9", r"c\.yaml:11: nics must be at most the 8 GPUs"),
    ("gb_per_s: 50", "gb_per_s: 0", r"c\.yaml:11: gb_per_s must be"),
    ("network: {nics: 8, gb_per_s: 50}\n", "", r"c\.yaml:2: 2 nodes need a network"),
    ("mfu: 0.6", "mfu: 0.6\n  mfu: 0.7", r"c\.yaml:7: 'mfu' stands on line 6 already"),
    ("name: small", "preset: H300", r"c\.yaml:1: preset must be one of"),
    ("{gb_per_s: 200}", "{gb_per_s: 200, ports: 8, links_per_gpu: 9}", r"links_per_gpu must be at"),
    ("gpu:", "gpu: [", r"c\.yaml:\d+: not YAML"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD_CLUSTERS)
def test_a_cluster_that_cannot_be_is_refused_with_its_line(old: str, new: str, words: str) -> None:
    assert old in CLUSTER
    with pytest.raises(ValueError, match=words):
        cluster(CLUSTER.replace(old, new, 1))


GRAPH = """\
graph:
  switches:
    - {name: left, ports: 2}
    - {name: right, ports: 2}
  links:
    - {from: node0, to: left, gb_per_s: 400}
    - {from: node1, to: right, gb_per_s: 400}
    - {from: left, to: right, gb_per_s: 100}
"""


def test_a_graph_holds_the_nics_to_its_narrowest_link() -> None:
    found = cluster(CLUSTER + GRAPH)
    assert found.network is not None
    # Either node sends all it has to the other through 100 GB/s, which 8 NICs share.
    assert found.network.bytes_per_s == pytest.approx(100e9 / 8)
    wide = cluster(CLUSTER + GRAPH.replace("gb_per_s: 100", "gb_per_s: 4000"))
    assert wide.network is not None and wide.network.bytes_per_s == pytest.approx(48e9)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ports: 2", "ports: 1", "c.yaml:19: left has 1 ports, this link would be number 2"),
        ("from: node0", "from: node7", "c.yaml:17: from must be node0 to node1 or a switch"),
        ("gb_per_s: 100", "gb_per_s: 0", "c.yaml:19: gb_per_s must be"),
        ("    - {from: left, to: right, gb_per_s: 100}\n", "", "node1 is not linked to node0"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_with_its_line(old: str, new: str, words: str) -> None:
    import re

    text = CLUSTER + GRAPH.replace(old, new, 1)
    with pytest.raises(ValueError, match=re.escape(words)):
        cluster(text)


def test_a_node_can_be_imported(tmp_path: Path) -> None:
    rows = ["\tGPU0\tGPU1\tNIC0", "GPU0\t X \tNV18\tPIX", "GPU1\tNV18\t X \tPIX"]
    (tmp_path / "topo.txt").write_text("\n".join(rows))
    text = "preset: H200\nnodes: 1\nmachine: {nvidia_smi: topo.txt}\n"
    found = cluster(text, tmp_path)
    assert found.gpus_per_node == 2 and found.nvlink_bytes_per_s == pytest.approx(0.79 * 450e9)
    with pytest.raises(ValueError, match=r"c\.yaml:4: gpus_per_node must be 2, as"):
        cluster(text + "gpus_per_node: 8\n", tmp_path)
    with pytest.raises(ValueError, match=r"c\.yaml:3: cannot read .*nothing\.txt"):
        cluster(text.replace("topo.txt", "nothing.txt"), tmp_path)


def test_a_hugging_face_config_is_counted_right(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    found = load_model(tmp_path)
    assert found.parameters / 1e9 == pytest.approx(46.7, abs=0.1)
    assert found.attention.kind == "GQA" and found.cache_bytes == 4096
    shared = load_model(Path(load_model.__code__.co_filename).parent / "models/deepseek_v3.json")
    assert shared.parameters / 1e9 == pytest.approx(671, abs=1)
    assert shared.attention.kind == "MLA" and shared.cache_bytes * 61 == 70272
    assert (shared.dtype, shared.moe_layers, shared.shared_experts) == ("fp8", 58, 1)


MAVERICK = {
    "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 2, "num_hidden_layers": 48,
    "num_local_experts": 128, "num_experts_per_tok": 1, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_interleaved_dense_layers_and_a_shared_expert_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MAVERICK))
    found = load_model(tmp_path)
    assert (found.moe_layers, found.dense_layers, found.shared_experts) == (24, 24, 1)
    assert found.parameters / 1e9 == pytest.approx(400, abs=2)
    listed = MIXTRAL | {"mlp_only_layers": [0, 5]}
    (tmp_path / "config.json").write_text(json.dumps(listed))
    assert load_model(tmp_path).dense_layers == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "2: layer_types must be a list"),
        ({"mamba_d_state": 16}, "2: mamba_d_state is of a model whose layers do not all attend"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "3: quant_method must be fp8"),
        ({"num_experts_per_tok": None}, ": num_experts_per_tok must be a whole number"),
    ],
)
def test_what_the_planner_cannot_count_is_refused_with_its_line(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    # The change stands first: its line is the second, or the third inside a block.
    text = json.dumps(change | {k: v for k, v in MIXTRAL.items() if k not in change}, indent=1)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json:\d*{words}"):
        load_model(tmp_path)


def test_our_model_file(tmp_path: Path) -> None:
    found = model(MODEL, tmp_path)
    assert found.moe_layers == 3 and found.attention.kind == "MHA"
    assert found.expert_bytes == 3 * 512 * 1024 * 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("layers: 4", "layers: 1", "model.yaml:3: layers must be more than the 1 dense layers"),
        ("top_k: 2", "top_k: 17", "model.yaml:7: experts must be in [1, 16]"),
        ("intermediate: 1024", "intermediate: 1023", "model.yaml:7: intermediate_size must be a"),
        ("count: 16", "cont: 16", "model.yaml:7: count is missing"),
        ("hidden: 512", "hidden: 512\nwidth: 3", "model.yaml:6: unknown field 'width'"),
        ("heads: 8,", "heads: 8, kv_heads: 3,", "8 heads do not divide into 3"),
        ("layers: 4", "layers: four", "model.yaml:3: layers must be a whole number"),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_its_line(
    old: str, new: str, words: str, tmp_path: Path
) -> None:
    import re

    with pytest.raises(ValueError, match=re.escape(words)):
        model(MODEL.replace(old, new, 1), tmp_path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = {k: v for k, v in MIXTRAL.items() if k != "num_local_experts"}
    (tmp_path / "config.json").write_text(json.dumps(dense, indent=1))
    with pytest.raises(ValueError, match=r"config\.json:1: no number of experts .* is this a MoE"):
        load_model(tmp_path)


def test_a_workload_file() -> None:
    found = workload("phase: prefill\nrouting: zipf:1.1\nstrategies: {ep: [8], tp: [1]}\n")
    assert found.forwarded and found.space.ep == (8,)
    timed = workload("arrival: {rate: 5, seconds: 20}\n")
    assert timed.arrival is not None and timed.arrival.rate == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("phase: dekode\n", r"w\.yaml:1: phase must be one of decode, prefill, got 'dekode'"),
        ("routing: zipf\n", r"w\.yaml:1: routing must be one of uniform, zipf"),
        ("seed: 0\nstrategies:\n  ep: [5]\n", r"w\.yaml:3: ep must be a divisor of 16 or 48"),
        ("strategies:\n  families: [epp]\n", r"w\.yaml:2: families must be a list out of"),
        ("strategies:\n  tp: []\n", r"w\.yaml:2: tp must be a list"),
        ("sequences: -1\n", r"w\.yaml:1: sequences must be a whole number"),
        ("arrival: {rate: 0}\n", r"w\.yaml:1: rate must be"),
        ("arrival: {times: none.txt}\n", r"w\.yaml:1: none\.txt must be a file of seconds"),
        ("- a\n", r"w\.yaml:1: expected fields"),
        ("", r"w\.yaml:1: the file is empty"),
    ],
)
def test_a_wrong_workload_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        workload(text)


def write_trace(path: Path, experts: int, layers: int) -> None:
    info = TraceInfo(model="m", num_experts=experts, top_k=2, layers=layers, text_sha256="0" * 64)
    with TraceWriter(path, info) as trace:
        for step in range(3):
            for layer in range(layers):
                counts = [0] * experts
                counts[(step + layer) % experts] = 6
                trace.add(step, layer, counts)


def test_a_trace_is_read_and_another_models_is_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet", 16, 3)
    found = workload("trace: t.parquet\n", tmp_path)
    assert found.trace is not None and found.trace.shape == (3, 3, 16)
    assert found.trace.sum() == 3 * 3 * 6
    write_trace(tmp_path / "t.parquet", 8, 3)
    with pytest.raises(ValueError, match=r"w\.yaml:1: .*a model with 8 experts, expected 16"):
        workload("trace: t.parquet\n", tmp_path)
    write_trace(tmp_path / "t.parquet", 16, 2)
    with pytest.raises(ValueError, match=r"w\.yaml:1: trace must be of 3 MoE layers"):
        workload("trace: t.parquet\n", tmp_path)


def test_quantities_keep_their_types() -> None:
    block: Any = parse("a: true\nb: 1e3\nc: null\nd: [1, 2]\n", "x.yaml")
    assert block.boolean("a") is True and block.number("b") == 1000
    assert block.text("c", None) is None
    with pytest.raises(ValueError, match=r"x\.yaml:3: c must be a text, got None"):
        block.text("c")
    assert block.integers("d") == (1, 2)
    block.done()
