"""Hypothesis strategies for every kind of configuration."""

from typing import Any

from hypothesis import strategies as st

from dilated_factory import LongNetConfig, LongNetEncoderConfig, TrainConfig
from dilated_factory.configs import layouts
from dilated_factory.configs.attention import (
    AutoConfig,
    BlockSparseConfig,
    BlockSparseDilatedConfig,
    BlockSparseRingConfig,
    BlockSparseRingDistributedConfig,
    DilatedConfig,
    MultiheadConfig,
    RingConfig,
    RingMultiheadConfig,
)
from dilated_factory.configs.base import FrozenConfig
from dilated_factory.configs.pool import PoolConfig

sizes = st.integers(1, 2**20)
shares = st.floats(0, 0.999)
counts = st.integers(0, 2**20)
scales = st.none() | st.floats(-1e6, 1e6)
strategies = st.sampled_from(["auto", "gather", "heads", "lend", "ring"])
validations = st.sampled_from(["first", "always", "off"])

LAYOUTS: dict[type[FrozenConfig], dict[str, st.SearchStrategy[Any]]] = {
    layouts.SlidingWindowConfig: {"window": counts},
    layouts.DilatedWindowConfig: {"window": counts, "dilation": sizes},
    layouts.StridedConfig: {"stride": sizes},
    layouts.FixedConfig: {"stride": sizes, "summary": sizes},
    layouts.GlobalTokensConfig: {"count": counts},
    layouts.RandomBlocksConfig: {"count": counts, "seed": counts, "heads": sizes},
    layouts.BigBirdConfig: {"window_blocks": sizes, "global_blocks": counts, "heads": sizes},
    layouts.LongformerConfig: {"window": counts, "global_count": counts},
    layouts.DocumentConfig: {"lengths": st.lists(counts, max_size=3).map(tuple)},
    layouts.PrefixConfig: {"count": counts},
    layouts.HierarchicalConfig: {"window": counts, "levels": sizes, "growth": st.integers(2, 9)},
}
layout_configs = st.one_of(
    [st.builds(kind, block_size=sizes, **fields) for kind, fields in LAYOUTS.items()]
)


@st.composite
def pattern_fields(draw: st.DrawFn) -> dict[str, Any]:
    branches = draw(st.integers(1, 3))
    pair = st.lists(sizes, min_size=branches, max_size=branches).map(tuple)
    return {
        "segment_lengths": draw(pair),
        "dilation_rates": draw(pair),
        "head_offsets": draw(st.sampled_from(["interleaved", "blocked"])),
        "head_groups": draw(st.sampled_from(["shared", "split"])),
        "count_padding": draw(st.booleans()),
    }


@st.composite
def multihead_fields(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    return {
        "embed_dim": heads * draw(st.integers(1, 64)),
        "num_heads": heads,
        "num_kv_heads": draw(st.none() | st.just(kv_heads)),
        "bias": draw(st.booleans()),
        "layer_norm": draw(st.booleans()),
        "layer_norm_eps": draw(st.floats(1e-12, 1)),
        "gamma_init": draw(st.floats(1e-3, 1e3)),
    }


dilated_configs = st.builds(
    lambda pattern, **rest: DilatedConfig(**pattern, **rest),
    pattern_fields(),
    scale=scales,
    dropout=shares,
    backend=st.sampled_from([None, "reference", "torch", "triton"]),
)
ring_configs = st.builds(
    lambda pattern, **rest: RingConfig(**pattern, **rest),
    pattern_fields(),
    scale=scales,
    strategy=strategies,
    validate_ranks=validations,
)
sparse_configs = st.builds(
    BlockSparseConfig, layout=layout_configs, scale=scales, dropout=shares
) | st.builds(
    lambda pattern, **rest: BlockSparseDilatedConfig(**pattern, **rest),
    pattern_fields(),
    layout=layout_configs,
    dropout=shares,
)
sparse_ring_configs = st.builds(
    BlockSparseRingConfig, layout=layout_configs, scale=scales, strategy=strategies
) | st.builds(BlockSparseRingDistributedConfig, layout=layout_configs, dropout=shares)


@st.composite
def auto_configs(draw: st.DrawFn) -> AutoConfig:
    kv_heads, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pattern = draw(pattern_fields())
    layout = draw(st.none() | layout_configs)
    if layout is not None and draw(st.booleans()):
        pattern = {}
    return AutoConfig(
        length=draw(sizes),
        heads=kv_heads * draw(st.integers(3, 5)),
        kv_heads=kv_heads,
        head_dim=draw(sizes),
        is_causal=draw(st.booleans()),
        layout=layout,
        device=draw(st.sampled_from(["cpu", "cuda"])),
        dtype=draw(st.sampled_from(["float16", "float64"])),
        world=nodes * draw(st.integers(1, 8)),
        nodes=nodes,
        **pattern,
    )


head_configs = (
    dilated_configs | ring_configs | sparse_configs | sparse_ring_configs | auto_configs()
)
multihead_configs = st.builds(
    lambda fields, attention: MultiheadConfig(**fields, attention=attention),
    multihead_fields(),
    head_configs,
) | st.builds(
    lambda pattern, fields: RingMultiheadConfig(**pattern, **fields),
    pattern_fields(),
    multihead_fields(),
)
pool_configs = st.builds(
    PoolConfig,
    limit_bytes=st.none() | counts,
    overhead=st.just("unlimited") | st.floats(1, 9),
    fill=st.sampled_from([None, "poison"]),
    stacks=st.booleans(),
)


@st.composite
def stack_fields(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 12))
    branches = draw(st.integers(1, 4))
    context = draw(sizes)
    return {
        "embed_dim": 2 * heads * draw(st.integers(1, 64)),
        "num_heads": heads,
        "num_layers": draw(st.integers(1, 48)),
        "ffn_dim": draw(st.none() | sizes),
        "segment_lengths": (
            draw(st.integers(1, context)),
            *[draw(sizes) for _ in range(branches - 1)],
        ),
        "dilation_rates": (1,) * branches,
        "head_offsets": draw(st.sampled_from(["interleaved", "blocked"])),
        "count_padding": draw(st.booleans()),
        "context": context,
        "positions": draw(st.sampled_from(["rotary", "xpos", "none"])),
        "rotary_base": draw(st.floats(1.5, 1e9)),
        "xpos_scale_base": 2**20,
        "dropout": draw(shares),
        "layer_norm_eps": draw(st.floats(1e-12, 1)),
    }


model_configs = st.builds(
    lambda fields, **rest: LongNetConfig(**fields, **rest),
    stack_fields(),
    vocab_size=sizes,
    tie_embeddings=st.booleans(),
)
encoder_configs = st.builds(
    lambda fields, **rest: LongNetEncoderConfig(**fields, **rest),
    stack_fields(),
    vocab_size=st.none() | sizes,
    scale_embedding=st.booleans(),
)
train_configs = st.builds(
    TrainConfig,
    model=model_configs,
    paths=st.lists(st.text(st.characters(codec="utf-8")), max_size=3).map(tuple),
    minutes=st.floats(1e-9, 1e3),
    seed=st.integers(0, 2**63 - 1),
)
any_config: st.SearchStrategy[FrozenConfig] = st.one_of(
    head_configs, multihead_configs, pool_configs, model_configs, encoder_configs, train_configs
)
