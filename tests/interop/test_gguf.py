"""GGUF files: what they say, their tensors multiplied out, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from adaptive.errors import UserError
from adaptive.interop import huggingface
from adaptive.interop.families import families
from adaptive.interop.gguf import read_gguf
from adaptive.interop.gguf_model import named
from adaptive.interop.source import source

TEXT, U32, F32, LIST, BOOL = 8, 4, 6, 9, 7


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(kind, content):
    if kind == TEXT:
        return text(content)
    if kind == LIST:
        inner = {str: TEXT, float: F32}.get(type(content[0]), U32)
        return struct.pack("<IQ", inner, len(content)) + b"".join(value(inner, item) for item in content)
    return struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], content)


def gguf(path, values, tensors, *, counts=None, version=3):
    """Writes a file; values: name -> (type, content), tensors: name -> (type, shape outermost first, bytes)."""
    number = (len(tensors), len(values)) if counts is None else counts
    head = b"GGUF" + struct.pack("<IQQ", version, *number)
    head += b"".join(
        text(name) + struct.pack("<I", kind) + value(kind, content) for name, (kind, content) in values.items()
    )
    offset, data = 0, b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        data += content + bytes(-len(content) % 32)
        offset = len(data)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def packed(kind, rng):
    """(bytes of a block, its 32 weights) written out weight by weight."""
    d, m = np.float16(rng.uniform(0.5, 2)), np.float16(rng.uniform(-1, 1))
    q = rng.integers(0, 32 if kind in (6, 7) else 16, 32)
    low = bytes(int(q[j] & 15 | (q[j + 16] & 15) << 4) for j in range(16))
    high = struct.pack("<I", sum(int(bit >> 4) << j for j, bit in enumerate(q)))
    d_bytes, both = d.tobytes(), d.tobytes() + m.tobytes()
    d, m = np.float32(d), np.float32(m)
    if kind == 8:
        q = rng.integers(-128, 128, 32)
        return d_bytes + q.astype(np.int8).tobytes(), d * q
    return {
        2: (d_bytes + low, d * (q - 8)), 3: (both + low, d * q + m), 6: (d_bytes + high + low, d * (q - 16)),
        7: (both + high + low, d * q + m),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", [2, 3, 6, 7, 8])
def test_quantised_tensors_are_multiplied_out(tmp_path, kind):
    blocks = [packed(kind, np.random.default_rng(i)) for i in range(6)]
    path = gguf(tmp_path / "a.gguf", {}, {"x": (kind, (3, 64), b"".join(content for content, _ in blocks))})
    want = np.concatenate([weights for _, weights in blocks]).reshape(3, 64)
    found = read_gguf(path).tensors["x"]
    assert found.shape == (3, 64) and found.dtype == np.float32
    np.testing.assert_allclose(np.asarray(found), want, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found[1:3]), want[1:3], rtol=1e-6)


def kay(kind, b):
    """The 256 weights of a block of bytes, as the loops of llama.cpp's ggml-quants.c read it."""
    half = lambda i: float(np.frombuffer(bytes(b[i : i + 2]), np.float16)[0])  # noqa: E731
    signed = lambda v: v - 256 if v > 127 else v  # noqa: E731
    y = []

    def pair(scales, j):
        if j < 4:
            return scales[j] & 63, scales[j + 4] & 63
        return scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4

    if kind == 10:
        for n, i in ((n, i) for n in range(2) for i in range(4)):
            for part in range(2):
                scale, q = b[8 * n + 2 * i + part], b[16 + 32 * n + 16 * part :]
                y += [half(80) * (scale & 15) * (q[l] >> 2 * i & 3) - half(82) * (scale >> 4) for l in range(16)]
    if kind == 11:
        packed = b[96:108]
        for n, i, part in ((n, i, part) for n in range(2) for i in range(4) for part in range(2)):
            j = 8 * n + 2 * i + part
            scale = (packed[j % 8] >> 4 * (j // 8) & 15) | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4
            q, high = b[32 + 32 * n + 16 * part :], b[16 * part :]
            less = [0 if high[l] >> 4 * n + i & 1 else 4 for l in range(16)]
            y += [half(108) * (scale - 32) * ((q[l] >> 2 * i & 3) - less[l]) for l in range(16)]
    if kind in (12, 13):
        q, high = (b[48:], b[16:48]) if kind == 13 else (b[16:], [0] * 32)
        for j in range(8):
            scale, least = pair(b[4:16], j)
            low = [q[32 * (j // 2) + l] >> 4 * (j % 2) & 15 for l in range(32)]
            y += [half(0) * scale * (low[l] + 16 * (high[l] >> j & 1)) - half(2) * least for l in range(32)]
    if kind == 14:
        for n, run in ((n, run) for n in range(2) for run in range(4)):
            for l in range(32):
                low = b[64 * n + 32 * (run % 2) + l] >> 4 * (run // 2) & 15
                q = (low | (b[128 + 32 * n + l] >> 2 * run & 3) << 4) - 32
                y.append(half(208) * signed(b[192 + 8 * n + 2 * run + l // 16]) * q)
    if kind == 23:
        table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
        for j in range(8):
            scale = (b[4 + j // 2] >> 4 * (j % 2) & 15) | ((b[2] | b[3] << 8) >> 2 * j & 3) << 4
            q = b[8 + 16 * j :]
            y += [half(0) * (scale - 32) * table[q[l % 16] >> 4 * (l // 16) & 15] for l in range(32)]
    return y


@pytest.mark.parametrize(("kind", "size", "halves"), [
    (10, 84, (80, 82)), (11, 110, (108,)), (12, 144, (0, 2)), (13, 176, (0, 2)), (14, 210, (208,)), (23, 136, (0,)),
])  # fmt: skip
def test_blocks_of_256_are_multiplied_out(tmp_path, kind, size, halves):
    blocks = np.random.default_rng(kind).integers(0, 256, (4, size), np.uint8)
    for i in halves:
        blocks[:, i : i + 2] = np.array([[0.5], [-2], [0.01], [3]], np.float16).view(np.uint8)
    path = gguf(tmp_path / "a.gguf", {}, {"x": (kind, (2, 512), blocks.tobytes())})
    want = np.array([kay(kind, block.tolist()) for block in blocks]).reshape(2, 512)
    found = read_gguf(path).tensors["x"]
    np.testing.assert_allclose(np.asarray(found), want, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found[1:2]), np.asarray(found)[1:2])


WIDTH, HEADS, GROUPS, INNER, VOCAB = 32, 4, 2, 64, 48


def llama(path, *, values=(), tensors=(), tokenizer=True):
    """A file of a small Llama; (its path, its weights under the library's names)."""
    rng, ours, theirs = np.random.default_rng(0), {}, {}
    dim = WIDTH // HEADS

    def add(name, own, *shape):
        ours[own] = rng.standard_normal(shape).astype(np.float32)
        turned = ours[own]
        if ".attn_q." in name or ".attn_k." in name:  # those that rotate together stand beside each other
            turned = turned.reshape(-1, 2, dim // 2, WIDTH).swapaxes(1, 2).reshape(turned.shape)
        theirs[name] = (0, shape, np.ascontiguousarray(turned).tobytes())

    add("token_embd.weight", "model.embed_tokens.weight", VOCAB, WIDTH)
    add("output_norm.weight", "model.norm.weight", WIDTH)
    layer, keys = "model.layers.0", GROUPS * dim
    for name, own, *shape in (
        ("attn_norm", "input_layernorm", WIDTH), ("ffn_norm", "post_attention_layernorm", WIDTH),
        ("attn_q", "self_attn.q_proj", WIDTH, WIDTH), ("attn_k", "self_attn.k_proj", keys, WIDTH),
        ("attn_v", "self_attn.v_proj", keys, WIDTH), ("attn_output", "self_attn.o_proj", WIDTH, WIDTH),
        ("ffn_gate", "mlp.gate_proj", INNER, WIDTH), ("ffn_up", "mlp.up_proj", INNER, WIDTH),
        ("ffn_down", "mlp.down_proj", WIDTH, INNER),
    ):  # fmt: skip
        add(f"blk.0.{name}.weight", f"{layer}.{own}.weight", *shape)
    about = {
        "general.architecture": (TEXT, "llama"), "llama.block_count": (U32, 1), "llama.embedding_length": (U32, WIDTH),
        "llama.feed_forward_length": (U32, INNER), "llama.attention.head_count": (U32, HEADS),
        "llama.attention.head_count_kv": (U32, GROUPS), "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 500.0), "llama.context_length": (U32, 128),
    }  # fmt: skip
    letters = [chr(i) for i in range(33, 33 + VOCAB - 1)]
    if tokenizer:
        about |= {
            "tokenizer.ggml.model": (TEXT, "gpt2"), "tokenizer.ggml.pre": (TEXT, "smollm"),
            "tokenizer.ggml.tokens": (LIST, ["<|end|>", *letters]), "tokenizer.ggml.merges": (LIST, ["! \""]),
            "tokenizer.ggml.token_type": (LIST, [3] + [1] * (VOCAB - 1)), "tokenizer.ggml.eos_token_id": (U32, 0),
        }  # fmt: skip
        about["tokenizer.ggml.tokens"][1][-1] = '!"'
    gguf(path, about | dict(values), theirs | dict(tensors))
    return path, ours


def test_a_llama_has_the_library_s_names_and_order_of_rows(tmp_path):
    path, want = llama(tmp_path / "small.gguf")
    found = source(path)
    assert (found.name, found.kind, set(found.tokenizer)) == (
        "small",
        "llama",
        {"tokenizer.json", "tokenizer_config.json"},
    )
    assert set(found.tensors) == set(want)
    for name, weight in want.items():
        np.testing.assert_array_equal(np.asarray(found.tensors[name]), weight, err_msg=name)
    settings = huggingface.settings_of(families()["llama"], found.config)
    mixer = settings.body.stack.blocks[0].mixer
    assert (mixer.heads, mixer.groups, mixer.rope_theta, settings.norm_eps) == (HEADS, GROUPS, 500.0, 1e-5)
    assert settings.tie_embeddings and settings.vocab_size == VOCAB


def test_its_tokenizer_encodes(tmp_path):
    pytest.importorskip("tokenizers")
    from adaptive.data.tokenizers import load_tokenizer

    found = source(llama(tmp_path / "small.gguf")[0])
    found.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (0, None, VOCAB)
    assert tokenizer.encode('!"12').tolist() == [VOCAB - 1, 17, 18] and tokenizer.decode([VOCAB - 1, 17]) == '!"1'


@pytest.mark.parametrize(("split", "tokens"), [("qwen2", 2), ("llama-bpe", 1)])
def test_a_tokenizer_splits_numbers_as_its_name_says(tmp_path, split, tokens):
    pytest.importorskip("tokenizers")
    from adaptive.data.tokenizers import load_tokenizer

    made = ["<|end|>", *(chr(i) for i in range(33, 33 + VOCAB - 2)), "12"]
    own = {"pre": (TEXT, split), "tokens": (LIST, made), "merges": (LIST, ["1 2"])}
    path = llama(tmp_path / "small.gguf", values={f"tokenizer.ggml.{name}": value for name, value in own.items()})[0]
    source(path).write_tokenizer(tmp_path / "tokenizer")
    assert len(load_tokenizer(str(tmp_path / "tokenizer")).encode("12")) == tokens


def test_a_tokenizer_of_scores_merges_the_highest_first_and_falls_back_to_bytes(tmp_path):
    pytest.importorskip("tokenizers")
    from adaptive.data.tokenizers import load_tokenizer

    space = "\u2581"
    pieces = {  # token: (type, score)
        "<unk>": (2, 0.0), "<s>": (3, 0.0), "</s>": (3, 0.0), "<0xC3>": (6, 0.0), "<0xA9>": (6, 0.0), "abc": (1, -4.0),
        "ab": (1, -2.0), "bc": (1, -1.0), f"{space}a": (1, -3.0), "a": (1, -9.0), "b": (1, -10.0), "c": (1, -11.0),
        space: (1, -12.0),
    }  # fmt: skip
    own = {
        "model": (TEXT, "llama"), "tokens": (LIST, [*pieces]),
        "token_type": (LIST, [kind for kind, _ in pieces.values()]),
        "scores": (LIST, [score for _, score in pieces.values()]), "bos_token_id": (U32, 1), "eos_token_id": (U32, 2),
    }  # fmt: skip
    path = llama(tmp_path / "small.gguf", values={f"tokenizer.ggml.{name}": value for name, value in own.items()})[0]
    source(path).write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    read = lambda text: [[*pieces][i] for i in tokenizer.encode(text)]  # noqa: E731
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    # "bc" before "_a" before "ab"; then "a" with "bc", where nothing has taken it.
    assert read("abc") == [f"{space}a", "bc"] and read("cabc") == [space, "c", "abc"]
    assert read("b\u00e9 a") == [space, "b", "<0xC3>", "<0xA9>", f"{space}a"]
    assert tokenizer.decode(tokenizer.encode("b\u00e9 a").tolist()) == "b\u00e9 a"


def test_factors_of_wave_lengths_are_a_scaling(tmp_path):
    """As llama.cpp's convert_hf_to_gguf.py writes them."""
    factors = []
    for i in range(0, WIDTH // HEADS, 2):
        wave = 2 * np.pi * 500_000 ** (i / (WIDTH // HEADS))
        smooth = (8192 / wave - 1) / 3
        factors.append(1 if wave < 8192 / 4 else 32 if wave > 8192 else 1 / ((1 - smooth) / 32 + smooth))
    assert len({*factors}) > 2
    values = {"llama.rope.freq_base": (F32, 500_000.0)}

    def written(content):
        tensor = (0, (len(content),), np.array(content, np.float32).tobytes())
        return llama(tmp_path / "small.gguf", values=values, tensors={"rope_freqs.weight": tensor})[0]

    scaling = source(written(factors)).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"rope_freqs.weight is no scaling of Llama 3's"):
        source(written([2.0 * x for x in factors]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (10**9, 0)}, "claims 1,000,000,000 tensors and 0 values in 32 bytes"),
        ({"version": 9}, "it is of version 9, known: 2, 3"),
        ({"tensors": {"x": (16, (2, 256), bytes(132))}}, "x is of type IQ2_XXS, which is not read here; known: F32"),
        ({"tensors": {"x": (0, (2**30, 4), bytes(8))}}, "x claims 17,179,869,184 bytes"),
        ({"tensors": {"x": (2, (2, 33), bytes(8))}}, r"x has shape \[2, 33\] and blocks of 32"),
    ],
)
def test_files_that_are_refused(tmp_path, change, message):
    arguments = {"values": {}, "tensors": {}} | change
    with pytest.raises(UserError, match=message):
        read_gguf(gguf(tmp_path / "a.gguf", **arguments))


def test_damage_is_told(tmp_path):
    path, _ = llama(tmp_path / "small.gguf")
    whole = path.read_bytes()
    for content in (b"GGML" + whole[4:], whole[:50], whole[:-200], whole[:24] + b"\xff" * 8 + whole[32:]):
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.gguf is damaged or no GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": (TEXT, "mamba")}, "its architecture is 'mamba', known of GGUF files: llama, qwen2"),
        ({"llama.rope.scaling.type": (TEXT, "yarn")}, "llama.rope.scaling.type=yarn is not read from GGUF files"),
        ({"llama.rope.dimension_count": (U32, 4)}, "rotary embeddings of a part of each head"),
        ({"llama.block_count": (TEXT, "x")}, "llama.block_count is 'x', expected a number"),
    ],
)
def test_models_that_are_refused(tmp_path, values, message):
    path, _ = llama(tmp_path / "small.gguf", values=values.items())
    with pytest.raises(UserError, match=message):
        named(read_gguf(path), str(path))


def test_other_tokenizers_have_to_be_given(tmp_path):
    assert source(llama(tmp_path / "a.gguf", tokenizer=False)[0]).tokenizer == {}
    with pytest.raises(UserError, match=r"expected a folder with a config\.json, or a"):
        source(Path(tmp_path / "gone"))
