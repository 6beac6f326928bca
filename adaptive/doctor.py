"""Do the installed versions fit? `adaptive doctor` also shows the devices and the optional packages."""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.doctor"))

from collections.abc import Sequence

from adaptive import command
from adaptive.errors import UserError
from adaptive.versions import PYTHON, TESTED, check_versions, installed

OPTIONAL = {
    "tokenizers": ("bpe", "tokenizer.json files and training a BPE"),
    "pyarrow": ("hf", "Parquet files"),
    "zstandard": ("hf", "compressed jsonl files"),
    "huggingface-hub": ("hf", "exported models to the hub"),
    "datasets": ("hf", "data sets of the Hugging Face hub"),
    "wandb": ("wandb", "Weights & Biases"),
    "tensorboardx": ("tensorboard", "TensorBoard files"),
    "regex": ("words", "chunks of an H-Net that are words"),
    "lm-eval": ("lm_eval", "tasks of lm-evaluation-harness"),
    "jax-cuda13-plugin": ("gpu", "NVIDIA GPUs, driver 580 or newer"),
    "jax-cuda12-plugin": ("cuda12", "NVIDIA GPUs, driver 525 or newer"),
    "libtpu": ("tpu", "Cloud TPUs"),
}


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    command.Options("doctor", __doc__ or "").read(arguments)
    try:
        print(check_versions())
        code = 0
    except UserError as error:
        print(error)
        code = error.code
    for wanted in (PYTHON, *TESTED):
        print(f"  {wanted.package:18} tested: {wanted.low} and later, before {wanted.below}")
    print("optional packages")
    for package, (extra, enables) in OPTIONAL.items():
        state = installed(package) or f"absent, pip install 'adaptive-lm[{extra}]'"
        print(f"  {package:18} {enables}: {state}")
    if code == 0:
        import jax

        from adaptive.runs.platform import start_backend

        start_backend()
        print("devices")
        for device in jax.devices():
            print(f"  {device.id}: {device.device_kind} ({device.platform})")
    return code
