from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conflayers_cli.cli.main import main
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.notices import terminal_safe
from tests import processes
from tests.cli.conftest import Run, finished, save_model, save_profile, start, write_prompts

FAST = ("--dtype", "float32", "--device", "cpu", "-n", "6")


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "stats"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    return write_prompts(folder / "prompts.jsonl", "one", "two", "three")


class TestOnePrompt:
    def test_text_alone_goes_to_stdout(self, run: Run, profile: Path) -> None:
        result = run("generate", "Hello", "-p", profile, *FAST)
        document = run("generate", "Hello", "-p", profile, *FAST, "--json").document
        assert (result.code, result.err) == (0, "")
        assert result.out == document["text"] + "\n"

    def test_streaming_does_not_change_the_text(self, run: Run, profile: Path) -> None:
        streamed = run("generate", "Hello", "-p", profile, *FAST)
        whole = run("generate", "Hello", "-p", profile, *FAST, "--no-stream")
        assert streamed.out == whole.out

    def test_drafting_does_not_change_the_text(
        self, run: Run, profile: Path, model: Path, tmp_path: Path
    ) -> None:
        empty = save_profile(tmp_path / "empty.yaml", model, SkipPlan())
        none = save_profile(tmp_path / "none.yaml", model, max_tokens=0)
        sources = (
            ["-p", profile],
            ["--model", model, "--draft", "none"],
            ["-p", empty],
            ["-p", none],
        )
        runs = [run("generate", "Hello", *source, *FAST, "--json") for source in sources]
        ids = [result.document["token_ids"] for result in runs]
        assert ids == [ids[0]] * 4
        assert [result.document["stats"]["drafted"] > 0 for result in runs] == [True, *[False] * 3]

    def test_json_is_one_document(self, run: Run, profile: Path, model: Path) -> None:
        document = run("generate", "Hello", "-p", profile, *FAST, "--json").document
        expected = "schema_version model text token_ids finish_reason prompt_tokens seed stats"
        assert list(document) == expected.split()
        assert document["schema_version"] == 1
        assert document["model"] == str(model)
        assert (len(document["token_ids"]), document["finish_reason"]) == (6, "length")
        assert document["stats"]["tokens"] == 6
        assert document["stats"]["decode_tokens"] == 5

    def test_stats_go_to_stderr(self, run: Run, profile: Path) -> None:
        plain = run("generate", "Hello", "-p", profile, *FAST)
        result = run("generate", "Hello", "-p", profile, *FAST, "--stats")
        assert result.out == plain.out
        for word in ("tokens/s", "first token", "accepted", "tokens per step", "cpu", "float32"):
            assert word in result.err

    def test_stats_of_a_single_token(self, run: Run, model: Path) -> None:
        result = run("generate", "Hello", "-m", model, *FAST[:-1], "1", "--stats")
        assert result.code == 0
        assert "nothing decoded behind the first token" in result.err

    def test_stop_text_ends_the_answer(self, run: Run, model: Path) -> None:
        whole = run("generate", "Hello", "-m", model, *FAST, "--json").document
        stop = whole["text"][2]
        cut = run("generate", "Hello", "-m", model, *FAST, "--json", "--stop", stop).document
        assert cut["text"] == whole["text"][:2]
        assert cut["finish_reason"] == "stop"

    @pytest.mark.parametrize("target", ["0.99", "0", "-2", "nan", "inf"])
    def test_a_target_that_is_none_is_refused_before_a_model_is_loaded(
        self, run: Run, target: str
    ) -> None:
        lossy = ("--skip-only", f"--target-speedup={target}")
        result = run("generate", "Hello", "-m", "no-such-model", *lossy)
        assert (result.code, result.out) == (2, "")
        assert f"--target-speedup {target}: allowed is" in result.err

    def test_a_target_that_all_layers_meet_is_the_whole_model(self, run: Run, model: Path) -> None:
        own = run("generate", "Hello", "-m", model, *FAST)
        lossy = run("generate", "Hello", "-m", model, *FAST, "--skip-only", "--target-speedup", "1")
        assert lossy.out == own.out
        assert "leaves nothing out" in lossy.err
        assert "not the model's own" not in lossy.err

    def test_the_seed_decides_what_is_drawn(self, run: Run, profile: Path) -> None:
        drawing = ("-t", "1.5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.001")
        texts = [
            run("generate", "Hello", "-p", profile, *FAST, *drawing, "--seed", seed, "--json")
            for seed in (1, 1, 2)
        ]
        ids = [result.document["token_ids"] for result in texts]
        assert ids[0] == ids[1] != ids[2]

    def test_flags_without_effect_are_told(self, run: Run, model: Path) -> None:
        result = run("generate", "Hello", "-m", model, *FAST, "--top-p", "0.5")
        assert result.code == 0
        assert "--top-p changes nothing at --temperature 0" in result.err


class TestPromptText:
    def ids(self, run: Run, model: Path, *arguments: object, stdin: str | None = None) -> Any:
        result = run("generate", *arguments, "-m", model, *FAST, "--json", stdin=stdin)
        assert result.code == 0, result.err
        return result.document["token_ids"], result.document["prompt_tokens"]

    def test_stdin_takes_the_place_of_a_dash(self, run: Run, model: Path) -> None:
        argument = self.ids(run, model, "Explain:\n\nüber")
        assert self.ids(run, model, "Explain:", "-", stdin="über\n") == argument
        assert self.ids(run, model, "-", stdin="Explain:\n\nüber\n") == argument
        assert self.ids(run, model, stdin="Explain:\n\nüber\r\n") == argument

    def test_stdin_is_left_alone_otherwise(self, run: Run, model: Path) -> None:
        # as in a shell's `while read` loop
        with pytest.MonkeyPatch.context() as patch:
            rest = io.TextIOWrapper(io.BytesIO(b"the next prompt\n"))
            patch.setattr(sys, "stdin", rest)
            assert run("generate", "Hello", "-m", model, *FAST).code == 0
            assert rest.read() == "the next prompt\n"

    def test_system_and_raw(self, run: Run, model: Path) -> None:
        chat = self.ids(run, model, "abc")[1]
        assert self.ids(run, model, "abc", "--raw")[1] == 3
        assert chat == len("<user>abc\n<assistant>")
        assert self.ids(run, model, "abc", "--system", "xy")[1] == chat + len("<system>xy\n")
        assert self.ids(run, model, "abc", "--raw", "--system", "xy")[1] == 3 + 2 + 2

    def test_messages_without_a_chat_template(self, run: Run, tmp_path: Path) -> None:
        bare = save_model(tmp_path / "bare", template=None)
        line = {"messages": [{"role": "user", "content": "abc"}]}
        (tmp_path / "chat.jsonl").write_text(json.dumps(line) + "\n")
        result = run("generate", "-m", bare, *FAST, "--data", "chat.jsonl")
        assert result.lines[0]["prompt_tokens"] == 3

    @pytest.mark.parametrize(
        ("arguments", "stdin", "said"),
        [
            ([""], None, "the prompt is empty"),
            (["-"], "", "the prompt is empty"),
            ([], " \n", "the prompt is empty"),
            (["-"], b"\xff\xfd", "standard input:1: is not UTF-8"),
            (["caf\udce9"], None, "the prompt is not UTF-8"),
            (["hi", "--data", "x.jsonl"], None, "give one of the two"),
            (["hi", "--output", "x.jsonl"], None, "--output goes with --data"),
            (["hi", "--max-prompts", "2"], None, "--max-prompts goes with --data"),
            (["hi", "--prompt-column", "x"], None, "--prompt-column goes with --data"),
            (["hi", "--strict"], None, "--strict goes with --data"),
            (["--data", "x.jsonl", "--resume"], None, "--output FILE"),
            (["--data", "x.jsonl", "--json"], None, "--json"),
            (["--data", "missing.jsonl"], None, "missing.jsonl: there is no such file"),
            (["hi", "-t", "-1"], None, "--temperature"),
            (["hi", "-t", "nan"], None, "--temperature"),
            (["hi", "-t", "1", "--top-k", "0"], None, "--top-k"),
            (["hi", "--device", "tpu"], None, "tpu"),
            (["hi", "--dtype", "int8"], None, "int8"),
        ],
    )
    def test_bad_input_is_told_in_one_line(
        self, run: Run, model: Path, arguments: list[str], stdin: Any, said: str
    ) -> None:
        result = run("generate", *arguments, "-m", model, stdin=stdin)
        assert (result.code, result.out) == (2, "")
        assert said in result.err
        assert result.err.count("\n") == 1

    def test_no_prompt_at_a_terminal(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("conflayers_cli.cli.generate.is_terminal", lambda stream: True)
        result = run("generate", "-m", "smollm2")
        assert result.code == 2
        assert "no prompt" in result.err

    def test_neither_profile_nor_model(self, run: Run) -> None:
        result = run("generate", "hi")
        assert result.code == 2
        assert "--profile" in result.err
        assert "--model" in result.err


class TestFit:
    def test_a_profile_for_another_configuration_needs_force(
        self, run: Run, model: Path, tmp_path: Path
    ) -> None:
        other = save_profile(tmp_path / "other.yaml", model, config_hash="0" * 16)
        refused = run("generate", "hi", "-p", other, *FAST)
        assert refused.code == 2
        assert "another configuration" in refused.err
        assert "--force" in refused.err
        forced = run("generate", "hi", "-p", other, *FAST, "--force")
        assert forced.code == 0
        assert "warning" in forced.err

    def test_force_cannot_help_where_the_depth_differs(
        self, run: Run, model: Path, tmp_path: Path
    ) -> None:
        other = save_profile(tmp_path / "other.yaml", model, depth=9)
        for force in ([], ["--force"]):
            result = run("generate", "hi", "-p", other, *FAST, *force)
            assert result.code == 2
            assert "depth 5 here, 9 in the profile" in result.err
            assert "--force" not in result.err

    def test_the_context_bounds_the_answer(self, run: Run, tmp_path: Path) -> None:
        small = save_model(tmp_path / "small", max_position_embeddings=32)
        result = run("generate", "a" * 20, "--raw", "-m", small, "-n", "100", "--json")
        assert len(result.document["token_ids"]) <= 12
        assert "room for 12 new tokens instead of 100" in result.err
        full = run("generate", "a" * 32, "--raw", "-m", small)
        assert full.code == 2
        assert "too long: 32 tokens" in full.err

    def test_a_long_prompt_of_many_is_named_before_any_is_decoded(
        self, run: Run, tmp_path: Path
    ) -> None:
        small = save_model(tmp_path / "small", max_position_embeddings=32)
        data = write_prompts(tmp_path / "p.jsonl", "a", "b" * 99)
        result = run("generate", "--raw", "-m", small, "--data", data, "-o", "out.jsonl")
        assert (result.code, result.out) == (2, "")
        assert "prompt p1 is too long" in result.err
        assert (tmp_path / "out.jsonl").read_bytes() == b""


class TestFile:
    def test_lines_in_order(self, run: Run, profile: Path, prompts: Path, tmp_path: Path) -> None:
        printed = run("generate", "-p", profile, "--data", prompts, *FAST)
        keys = (
            "index id category request_sha256 text token_ids finish_reason prompt_tokens seed stats"
        )
        assert [list(line) for line in printed.lines] == [keys.split()] * 3
        assert [line["index"] for line in printed.lines] == [0, 1, 2]
        assert [line["id"] for line in printed.lines] == ["p0", "p1", "p2"]
        written = run("generate", "-p", profile, "--data", prompts, *FAST, "-o", "out.jsonl")
        assert (written.code, written.out, written.err) == (0, "", "")
        lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert list(map(without_times, lines)) == list(map(without_times, printed.lines))

    def test_max_prompts_and_stats(self, run: Run, profile: Path, prompts: Path) -> None:
        arguments = ("-p", profile, "--data", prompts, *FAST, "--max-prompts", 2, "--stats")
        result = run("generate", *arguments)
        assert len(result.lines) == 2
        assert "12 tokens for 2 prompts" in result.err

    def test_rows_are_skipped_and_a_resumed_run_may_read_another_format(
        self, run: Run, model: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a.csv").write_text("text,prompt\none,\n,no\ntwo,\n")
        (tmp_path / "b.jsonl").write_text('{"prompt": "one", "id": 1}\n{"prompt": "two", "id": 3}')
        arguments = ("generate", "-m", model, *FAST, "-o", "out.jsonl")
        refused = run(*arguments, "--data", "a.csv", "--prompt-column", "texts")
        assert refused.code == 2
        assert 'no column "texts"; give --prompt-column NAME as one of its keys: "text"' in (
            refused.err
        )
        column = ("--data", "a.csv", "--prompt-column", "text")
        strict = run(*arguments, *column, "--strict")
        assert (strict.code, "a.csv:3: text is empty" in strict.err) == (2, True)
        assert run(*arguments, *column, "--max-prompts", 1).code == 0
        result = run(*arguments, *column, "--resume")
        assert result.code == 0
        assert "note: skipped 1 of 3 rows of a.csv: 1 without usable text (line 3)" in result.err
        again = run(*arguments, "--data", "b.jsonl", "--resume")
        assert again.code == 0
        lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == ["1", "3"]

    def test_an_output_with_content_is_kept(
        self, run: Run, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out.jsonl").write_text("mine\n")
        result = run("generate", "-m", model, "--data", prompts, *FAST, "-o", "out.jsonl")
        assert result.code == 2
        assert "--resume" in result.err
        assert (tmp_path / "out.jsonl").read_text() == "mine\n"

    def test_resume_refuses_other_prompts(self, run: Run, model: Path, tmp_path: Path) -> None:
        first = write_prompts(tmp_path / "a.jsonl", "one", "two")
        other = write_prompts(tmp_path / "b.jsonl", "one", "else")
        assert run("generate", "-m", model, "--data", first, *FAST, "-o", "out.jsonl").code == 0
        result = run("generate", "-m", model, "--data", other, *FAST, "-o", "out.jsonl", "--resume")
        assert result.code == 2
        assert "out.jsonl:2: answers another prompt" in result.err

    def test_missing_folder(self, run: Run, model: Path, prompts: Path) -> None:
        result = run("generate", "-m", model, "--data", prompts, "-o", "no/where.jsonl")
        assert result.code == 2
        assert "does not exist" in result.err

    def test_resume_of_a_finished_run_needs_no_model(
        self, run: Run, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        arguments = ("generate", "-m", copy, "--data", prompts, *FAST, "-o", "out.jsonl")
        assert run(*arguments).code == 0
        shutil.rmtree(copy)
        result = run(*arguments, "--resume")
        assert result.code == 0
        assert "3 of 3 prompts are answered already" in result.err

    @pytest.mark.parametrize(
        "other", [("--temperature", 0.5), ("-n", 7), ("--system", "Be brief.")]
    )
    def test_resume_refuses_other_settings(
        self, run: Run, model: Path, prompts: Path, other: tuple[object, ...]
    ) -> None:
        arguments = ("generate", "-m", model, "--data", prompts, *FAST, "-o", "out.jsonl")
        assert run(*arguments).code == 0
        result = run(*arguments, *other, "--resume")
        assert result.code == 2
        assert "out.jsonl:1" in result.err and "other settings" in result.err


def test_a_stop_text_ends_its_own_row_of_a_lossy_batch(
    run: Run, model: Path, prompts: Path
) -> None:
    lossy = ("--skip-only", "--target-speedup", "1.7", "--batch-size", 3)
    arguments = ("generate", "-m", model, "--data", prompts, *FAST[:-1], 20, *lossy)
    whole = [line["text"] for line in run(*arguments).lines]
    letters = [c for text in whole for c in text if c.isascii()]
    stop = next(c for c in letters if any(c not in text for text in whole))
    cut = run(*arguments, "--stop", stop).lines
    assert [line["text"] for line in cut] == [text.split(stop)[0] for text in whole]
    assert {line["finish_reason"] for line in cut} == {"length", "stop"}


def test_a_lossy_batch_gives_whole_texts_and_shares_out_its_seconds(
    run: Run, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    for module in ("batch", "sequence"):
        name = f"conflayers_cli.generation.{module}.perf_counter"
        monkeypatch.setattr(name, lambda: float(next(ticks)))
    lossy = ("--skip-only", "--target-speedup", "1.7")
    arguments = ("generate", "-m", model, "--data", prompts, *FAST[:-1], 20, *lossy)
    alone, together = run(*arguments).lines, run(*arguments, "--batch-size", 3).lines
    assert [line["text"] for line in together] == [line["text"] for line in alone]
    # by this clock a pass takes a second: one for each prompt, one for a further token of all rows
    seconds = [
        [(line["stats"]["prefill_seconds"], line["stats"]["decode_seconds"]) for line in lines]
        for lines in (alone, together)
    ]
    assert seconds == [[(1.0, 19.0)] * 3, [(1.0, 6.333333)] * 3]


def test_a_prompts_text_depends_on_the_seed_and_itself(
    run: Run, model: Path, tmp_path: Path
) -> None:
    """Not on its place in the file, its neighbours, or what else runs beside it."""
    one = write_prompts(tmp_path / "one.jsonl", "Hello", "And you?", "Hello you")
    other = write_prompts(tmp_path / "other.jsonl", "Hello you", "Hello")
    drawing = ("-m", model, *FAST, "-t", "1.5", "--seed", 7)
    first = run("generate", "--data", one, *drawing).lines
    second = run("generate", "--data", other, *drawing, "--batch-size", 2).lines
    alone = run("generate", "Hello", *drawing, "--json").document
    texts = [[line["token_ids"] for line in lines] for lines in (first, second)]
    assert texts[0][0] == texts[1][1] == alone["token_ids"]
    assert texts[0][2] == texts[1][0] != alone["token_ids"]


def test_a_seed_that_is_not_given_is_drawn_and_named(run: Run, model: Path, tmp_path: Path) -> None:
    drawing = ("-m", model, *FAST, "-t", "1.5")
    drawn = [run("generate", "Hello", *drawing, "--json").document for _ in range(2)]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    again = run("generate", "Hello", *drawing, "--seed", drawn[0]["seed"], "--json", "--stats")
    assert again.document["token_ids"] == drawn[0]["token_ids"]
    assert f"sampled with seed {drawn[0]['seed']}" in again.err
    data = write_prompts(tmp_path / "prompts.jsonl", "Hello", "And you?")
    seeds = {line["seed"] for line in run("generate", "--data", data, *drawing).lines}
    assert len(seeds) == 1
    assert run("generate", "Hello", "-m", model, *FAST, "--json").document["seed"] is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, profile: Path, prompts: Path) -> Path:
    """The output of an uninterrupted, sampled run."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(resumable(profile, prompts, output)) == 0
    return output


def resumable(profile: Path, prompts: Path, output: Path) -> list[str]:
    arguments = ["generate", "-p", str(profile), "--data", str(prompts), "-o", str(output)]
    return [*arguments, *FAST, "-t", "1.0", "--seed", "7"]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_resume_after_a_cut_anywhere(
    share: float, whole: Path, profile: Path, prompts: Path, tmp_path: Path
) -> None:
    content = whole.read_bytes()
    output = tmp_path / "cut.jsonl"
    output.write_bytes(content[: int(share * len(content))])
    assert main([*resumable(profile, prompts, output), "--resume"]) == 0
    resumed, uninterrupted = (
        [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (output, whole)
    )
    assert resumed == uninterrupted


class TestStreams:
    def test_a_reader_that_goes_away(self, model: Path) -> None:
        arguments = ["generate", "Hello", "-m", model, *FAST[:-1], "200"]
        process = start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        process.stdout = None
        result = finished(process)
        assert result.code == 1
        assert result.err == (
            "conflayers: error: standard output was closed before all was written\n"
        )

    def test_an_interruption_keeps_the_lines(self, run: Run, model: Path, tmp_path: Path) -> None:
        data = write_prompts(tmp_path / "many.jsonl", *(f"prompt {i}" for i in range(25)))
        output = tmp_path / "out.jsonl"
        arguments = ["generate", "-m", model, "--data", data, "-o", output, *FAST[:-1], "60"]
        pipe = subprocess.PIPE
        process = processes.start("conflayers_cli", arguments, stdout=pipe, stderr=pipe)
        deadline = time.monotonic() + 100
        while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        result = finished(process)
        assert (result.code, result.out) == (130, "")
        assert "--resume goes on from there" in result.err
        assert result.err.endswith("conflayers: interrupted\n")
        content = output.read_text()
        assert content.endswith("\n")
        assert 0 < len(content.splitlines()) < 25
        assert run(*arguments, "--resume").code == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["index"] for line in lines] == list(range(25))

    @pytest.mark.skipif(sys.platform == "win32", reason="terminals are opened otherwise")
    def test_control_characters_do_not_reach_a_terminal(self, model: Path) -> None:
        import pty

        master, slave = pty.openpty()
        arguments = ["generate", "Hello", "-m", model, *FAST[:-1], "60"]
        null = subprocess.DEVNULL
        process = processes.start("conflayers_cli", arguments, stdout=slave, stderr=null)
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait(60) == 0
        os.close(master)
        text = shown.decode().replace("\r\n", "\n")  # the terminal's own line ends
        assert text
        assert terminal_safe(text) == text

    def test_control_characters_reach_a_pipe(self, run: Run, model: Path) -> None:
        result = run("generate", "Hello", "-m", model, *FAST[:-1], "60")
        assert terminal_safe(result.out) != result.out


def test_terminal_safe() -> None:
    assert terminal_safe("a\tb\nc") == "a\tb\nc"
    assert terminal_safe("\x1b[31m\x07\r\x7f\x9b") == "␛[31m␇␍␡\ufffd"
