"""The command: runs are made once, stop and go on, and what cannot be is told."""

import dataclasses
import functools
import io
import json

import jax
import pytest
import shapes
from sweeps import made

from adaptive import study, train
from adaptive.errors import NonFiniteError, UserError
from adaptive.recipe import Recipe
from adaptive.sweeps import ladder_results
from adaptive.sweeps import runs as sweep
from adaptive.sweeps.bar import Bar
from adaptive.sweeps.runs import Planned


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, none of them in fact; what `ends` has for a name happens instead."""
    names, ends = [], {}

    def pretend(recipe, folder):
        names.append(recipe.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(recipe.to_json())
        print(f"step {recipe.train.steps}/{recipe.train.steps}  loss 2.0")
        end = ends.pop(recipe.name, 0)
        if isinstance(end, BaseException):
            raise end
        return end

    def told(folder, run, score):
        (loss,) = made.losses([run], 0.46, 0.002)
        fields = {
            field.name: getattr(made.outcome(run, loss), field.name) for field in dataclasses.fields(sweep.Outcome)
        }
        return fields | {"format": 1, "drawn": {rule: list(a) for rule, a in fields["drawn"].items()}}

    monkeypatch.setattr(train, "train", pretend)
    monkeypatch.setattr(sweep, "outcome", told)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests' programs
    monkeypatch.setattr(ladder_results, "fit", functools.partial(ladder_results.fit, resamples=20))
    names.append(ends)
    return names


def test_finished_runs_are_not_made_again(tmp_path, trained, capsys):
    ends = trained.pop()
    command = ["ladder", "--quick", "--workdir", str(tmp_path / "s")]
    third = "recursive2-w16-x1-s0"
    ends[third] = 75
    assert study.main(command) == 75
    assert trained[-1] == third and len(trained) == 3
    assert "ended with code 75" in capsys.readouterr().err
    first = list(trained)
    assert study.main(command) == 0
    assert trained[3] == third and len(set(trained)) == 14 and trained[:3] == first and len(trained) == 15
    shown = capsys.readouterr()
    assert "100%" in shown.err and "the page is" in shown.out and "φ of recursive models" in shown.out
    text = (tmp_path / "s" / "ladder.md").read_text()
    assert "quick form" in text and (tmp_path / "s" / "ladder" / "phi.svg").exists()
    assert (tmp_path / "s" / "logs" / f"{third}.txt").read_text().count("loss 2.0") == 2  # of both attempts
    assert study.main(command) == 0 and len(trained) == 15


def test_runs_one_by_one_as_a_scheduler_makes_them(tmp_path, trained, capsys):
    trained.pop()
    folder = str(tmp_path / "s")
    assert study.main(["ladder", "--quick", "--workdir", folder, "--list_runs"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 14 and "14 of 14 runs are due" in shown.err
    assert lines[0] == f"adaptive study ladder --workdir {folder} --quick --only vanilla-w16-x0.5-s0"
    names = [line.split()[-1] for line in lines]
    for some in (names[:1], names[1:13], names[13:]):
        assert study.main([*lines[0].split()[2:-1], *some]) == 0
    assert trained == names
    assert (tmp_path / "s" / "ladder.md").exists()  # the last one makes the page
    capsys.readouterr()
    assert study.main(["ladder", "--quick", "--workdir", folder, "--list_runs"]) == 0
    assert capsys.readouterr().out == ""


def test_a_run_that_is_not_finite_stops_no_other(tmp_path, trained, capsys):
    ends = trained.pop()
    ends["mor3-w16-x1-s0"] = NonFiniteError("5 steps in a row")
    assert study.main(["ladder", "--quick", "--workdir", str(tmp_path)]) == NonFiniteError.code
    assert len(trained) == 14 and "not finite" in capsys.readouterr().err
    assert "left out: mor3-w16-x1-s0" in (tmp_path / "ladder.md").read_text()


def test_an_interrupt_says_how_to_go_on(tmp_path, trained, capsys):
    ends = trained.pop()
    ends["vanilla-w16-x1-s0"] = KeyboardInterrupt()
    assert study.main(["ladder", "--quick", "--workdir", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which study? there are: ec_vs_tc, ladder"),
        (["lader"], "there is no study 'lader'; did you mean ladder? there are: ec_vs_tc, ladder"),
        (["ladder", "--only", "mor3-w16"], "there is no such run; nearest: mor3-w16-x1-s0"),
        (["ladder", "--seeds", "0"], "must be at least 1"),
        (["ladder", "--match", "time"], "invalid choice"),
        (["ladder", "more"], "'more' is no option"),
        (["ladder", "--workdir", "gs://a/b"], "only paths on this machine"),
    ],
)
def test_what_cannot_be_is_told(words, told, capsys):
    assert study.main(words) == 2
    assert told in capsys.readouterr().err


def test_another_form_needs_another_folder(tmp_path, trained, capsys):
    trained.pop()
    assert study.main(["ladder", "--quick", "--workdir", str(tmp_path), "--only", "vanilla-w16-x1-s0"]) == 0
    assert study.main(["ladder", "--workdir", str(tmp_path)]) == 2
    assert "holds another study (study ladder, quick True, match compute)" in capsys.readouterr().err
    assert study.main(["ladder", "--quick", "--seeds", "2", "--workdir", str(tmp_path), "--list_runs"]) == 0
    (tmp_path / "study.json").write_text("[")
    assert study.main(["ladder", "--workdir", str(tmp_path)]) == 2
    assert "choose another --workdir" in capsys.readouterr().err


def planned(**labels) -> Planned:
    recipe = Recipe("one", model=shapes.plain(1, vocab_size=320, width=16, hidden=16, heads=2)).with_(
        "data.seq_len=32", "data.validation_every=80", "train.batch_size=8", "train.steps=2", "eval.every=0",
        "eval.rows=8", "eval.selection=topk", "log.sample_tokens=0", "log.wandb=disabled", "checkpoint.every=0",
    )  # fmt: skip
    return Planned("one", recipe, labels)


def test_an_outcome_of_other_settings_or_that_cannot_be_read_is_refused(tmp_path, trained):
    trained.pop()
    run = planned(once=1, shared=0, passes=1)
    assert sweep.kept(tmp_path, run) is None
    assert sweep.perform(tmp_path, run, train.train) == 0
    found = sweep.kept(tmp_path, run)
    assert found is not None and found.tokens == 2 * 8 * 32 and found.losses.shape == (1000,)
    other = dataclasses.replace(run, recipe=run.recipe.with_("train.steps=3"))
    with pytest.raises(UserError, match=r"train\.steps: 2 -> 3"):
        sweep.kept(tmp_path, other)
    path = run.folder(tmp_path) / "outcome.json"
    for text in ("", "[]", "{}", path.read_text().replace('"format": 1', '"format": 2')):
        path.write_text(text)
        with pytest.raises(UserError, match="remove it"):
            sweep.kept(tmp_path, run)


@pytest.mark.compiles
def test_a_run_is_trained_and_scored(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CACHE", str(tmp_path / "cache"))
    run, heard = planned(variant="vanilla"), []
    assert sweep.perform(tmp_path, run, train.train, heard.append) == 0
    found = sweep.kept(tmp_path, run)
    assert found is not None and heard[-1] == 2
    row = [json.loads(line) for line in (run.folder(tmp_path) / "metrics.jsonl").read_text().splitlines()][-1]
    assert 5 < found.loss < 7 and found.rule == "causal" and found.seconds > 0
    assert found.flops == pytest.approx(run.flops) and found.start["cores"] >= 1
    assert row["eval/loss"] == pytest.approx(found.loss, rel=0.05)  # of some of its rows
    assert "compiled" in run.log(tmp_path).read_text()


def test_what_is_said_of_a_signal_is_seen(capsys):
    kept, steps = io.StringIO(), []
    stream = sweep.Heard(kept, steps.append)
    for line in ("step 20/46  loss 4.4", "SIGINT: stopping now; there is nothing to save", "step 40/46  loss 3.1"):
        print(line, file=stream)
    assert steps == [20, 40] and kept.getvalue().count("\n") == 3
    assert capsys.readouterr().err == "\nSIGINT: stopping now; there is nothing to save\n"


def test_a_bar_on_a_terminal_is_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Bar(2, 1e12, stream) as bar:
        bar.at("a", 3.5e11)
        bar.finished("a", 5e11, "held-out loss 2.0000")
    shown = stream.getvalue()
    assert shown.startswith("\r\x1b[2K") and " 25%  a" in shown and shown.endswith("\r\x1b[2K")
    assert " 50%  a: held-out loss 2.0000, 500 GFLOP" in shown and shown.count("\n") == 1
