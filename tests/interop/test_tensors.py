"""Which tensors are taken as a model's weights."""

import ml_dtypes
import numpy as np
import pytest

from adaptive.errors import CheckpointError, RecipeError
from adaptive.interop.hf_moe_config import config_from_transformers
from adaptive.interop.official_hnet_layout import parse_layout
from adaptive.interop.official_mor_config import config_from_official
from adaptive.interop.tensors import Part, checked

pytestmark = pytest.mark.compiles  # conversions to float32

PARTS = {name: Part(name, (2, 3), False) for name in ("a", "b")}
WHOLE = {name: np.ones((2, 3), np.float32) for name in PARTS}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_, np.int64, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_integers_and_quantised_weights_are_refused_by_name_and_dtype(dtype):
    with pytest.raises(CheckpointError, match=rf"official k: b is {np.dtype(dtype).name}; .*quantised ones are not"):
        checked("k", {**WHOLE, "b": np.zeros((2, 3), dtype)}, PARTS, {})


def test_packed_weights_under_names_of_their_own_are_told_from_a_missing_tensor():
    packed = {"a": WHOLE["a"], "b.qweight": np.zeros((1, 3), np.int32), "b.qzeros": np.zeros((1, 1), np.int32)}
    with pytest.raises(CheckpointError, match=r"b\.qweight is int32; .*\(1 more tensors are none of these either\)"):
        checked("k", packed, PARTS, {})
    with pytest.raises(CheckpointError, match="ids is unknown to a model"):
        checked("k", {**WHOLE, "ids": np.arange(3)}, PARTS, {})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_numbers_that_are_not_finite_are_counted(dtype):
    one = np.ones((2, 3), dtype)
    checked("k", {"a": one, "b": one}, PARTS, {})
    one[0, :2] = np.nan, np.inf
    with pytest.raises(CheckpointError, match=r"2 of the 6 numbers in a are not finite in float32; such"):
        checked("k", {**WHOLE, "a": one}, PARTS, {})
    with pytest.raises(CheckpointError, match=r"2 of the 6 numbers in a .* and 2 in 1 more tensors"):
        checked("k", {"a": one, "b": one}, PARTS, {})


def test_doubles_beyond_float32_are_not_finite():
    with pytest.raises(CheckpointError, match="6 of the 6 numbers in b are not finite in float32"):
        checked("k", {**WHOLE, "b": np.full((2, 3), 1e300)}, PARTS, {})


def test_a_configuration_claims_no_layers_beyond_reason():
    """Each would be built before the first tensor is looked at."""
    qwen = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 10**9}
    with pytest.raises(RecipeError, match="num_hidden_layers=1000000000: must be at least 1 and at most 10000"):
        config_from_transformers("qwen3_moe", qwen)
    llama = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(RecipeError, match=r"num_hidden_layers=1000000000 must be at most 10000"):
        config_from_official({"llama": {**llama, "num_hidden_layers": 10**9}})
    for layout in (["m" + "9" * 5000], '["m100000"]'):
        with pytest.raises(RecipeError, match="a count from 1 to 9999"):
            parse_layout(layout)
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse_layout("[" * 100_000)


def test_a_configuration_has_numbers_where_they_belong():
    llama = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    with pytest.raises(RecipeError, match=r"llama\.rms_norm_eps is 'small'; it must be a number"):
        config_from_official({"llama": {**llama, "rms_norm_eps": "small"}})
