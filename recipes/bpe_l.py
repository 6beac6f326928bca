"""The transformer on GPT-2's tokens that the byte-level models of size L are matched to: T24, width 1536 (757M).

python -m adaptive.train --recipe bpe_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          heads and rotary dimension (the released main network's); tied embeddings, which the printed 760M implies,
          hence their std. 50257 tokens rounded up to 50304; rows of 1792 tokens hold as many bytes as 8192 bytes do
Expect:   held-out FineWeb-Edu 0.756 bits per byte, average accuracy 53.3 (H-Net paper, tables of the main results);
          not measured here
Cost:     not measured; reduced twin: recipes/vanilla_tiny.py with data.tokenizer=bpe-4096 model.vocab_size=4096 (CPU,
          minutes)
"""

from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, titled
from adaptive.recipes.hnet_bases import BPE_STEPS, RATE_L, attends, on_bytes, published, repeated, trained


def recipe() -> Recipe:
    network = on_bytes(1536, plain.Settings(repeated(attends(1536, 4096, repeat=24))))
    return titled(
        changed(
            trained(network, RATE_L, BPE_STEPS),
            model={"vocab_size": 50304, "tie_embeddings": True, "embedding_std": 0.02},
            data={"tokenizer": "openai-community/gpt2", "seq_len": 1792},
        ),
        "bpe_l",
        "Transformer on GPT-2's tokens, size L (757M)",
        published("0.756 bits per byte, average accuracy 53.3"),
    )
