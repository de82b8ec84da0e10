"""The papers' tasks as prompts: CNN/DM with one shot, GSM8K with five, WMT14 de-en, Alpaca.

Rows come from the hub through Hugging Face's `datasets`, which is no dependency of the project;
they are drawn by a seeded generator, shots and prompts to calibrate on from the part for training,
prompts for the figures from the one for tests. What is built is kept as JSON lines, a file for each
task, number of shots, seed and part, so that it can be carried to a machine without a network. The
files are prompt files as any other: `conflayers calibrate --data` takes them.

The papers give the number of shots. The words around them are the plain labels below (Alpaca: the
template that its rows are published with), so figures may differ from theirs by that much.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.prompts import Prompt, read_prompts
from conflayers_cli.utils.files import write_atomically

Row = Mapping[str, Any]
Rows = Callable[["PaperTask", str], Iterable[Row]]

POOL = 2000
"""Rows at the beginning of a part that prompts are drawn from; more is not downloaded."""
KEPT = 100
"""Prompts in a file."""


@dataclass(frozen=True)
class PaperTask:
    """A task of the papers.

    Attributes:
        path, name: of the data set on the hub, and of its configuration.
        train, test: its parts that shots and prompts come from; the same one: no row twice.
        question: of a row, up to where the answer begins.
        answer: of a row, as it follows a shot's question.
        category: of Spec-Bench, the stand-in without a hub.
    """

    path: str
    name: str | None
    train: str
    test: str
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    category: str


def one_line(text: str) -> str:
    """A text without line ends, so that a blank line ends a shot and nothing else does."""
    return " ".join(text.split())


def alpaca_question(row: Row) -> str:
    """The template that Alpaca's rows are published with, with an input or without."""
    context = str(row.get("input") or "")
    opening = "Below is an instruction that describes a task"
    opening += ", paired with an input that provides further context." if context else "."
    given = f"\n\n### Input:\n{context}" if context else ""
    return (
        f"{opening} Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}{given}\n\n### Response:"
    )


TASKS: Mapping[str, PaperTask] = {
    "cnndm": PaperTask(
        path="abisee/cnn_dailymail",
        name="3.0.0",
        train="train",
        test="test",
        question=lambda row: f"Article: {one_line(row['article'])}\nSummary:",
        answer=lambda row: f" {one_line(row['highlights'])}",
        category="summarization",
    ),
    "gsm8k": PaperTask(
        path="openai/gsm8k",
        name="main",
        train="train",
        test="test",
        question=lambda row: f"Question: {one_line(row['question'])}\nAnswer:",
        answer=lambda row: f" {row['answer'].strip()}",
        category="math_reasoning",
    ),
    # The part for training is another kind of text, speeches in parliament; news are in both these.
    "wmt14": PaperTask(
        path="wmt/wmt14",
        name="de-en",
        train="validation",
        test="test",
        question=lambda row: f"German: {one_line(row['translation']['de'])}\nEnglish:",
        answer=lambda row: f" {one_line(row['translation']['en'])}",
        category="translation",
    ),
    "alpaca": PaperTask(
        path="tatsu-lab/alpaca",
        name=None,
        train="train",
        test="train",
        question=alpaca_question,
        answer=lambda row: f"\n{row['output'].strip()}",
        category="qa",
    ),
}


@dataclass(frozen=True)
class TaskPrompts:
    """The prompts of a task.

    Attributes:
        search: what strategies search on.
        figures: what is measured, none of them among the others.
        raw: whether the model gets them as they are, without its chat template.
    """

    search: tuple[Prompt, ...]
    figures: tuple[Prompt, ...]
    raw: bool


def few_shot(task: PaperTask, shots: Sequence[Row], row: Row) -> str:
    """A prompt: questions with their answers, a blank line behind each, and a question."""
    examples = [f"{task.question(shot)}{task.answer(shot)}\n\n" for shot in shots]
    return "".join([*examples, task.question(row)])


def built(
    name: str, shots: int, seed: int, rows: Rows
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(for the search, for the figures): the lines of a task's two files.

    Args:
        name: of the task.
        shots: examples before each question, the same ones everywhere.
        seed: of what is drawn.
        rows: gives the rows of a part.
    """
    task, chooser = TASKS[name], random.Random(seed)
    drawn: dict[str, Iterator[Row]] = {}
    for part in dict.fromkeys((task.train, task.test)):
        pool = list(islice(rows(task, part), POOL))
        drawn[part] = iter(chooser.sample(pool, len(pool)))
    examples = list(islice(drawn[task.train], shots))

    def lines(kind: str, part: str) -> list[dict[str, str]]:
        return [
            {
                "id": f"{name}-{kind}-{number}",
                "category": name,
                "prompt": few_shot(task, examples, row),
            }
            for number, row in enumerate(islice(drawn[part], KEPT), 1)
        ]

    return lines("search", task.train), lines("figures", task.test)


def hub_rows(task: PaperTask, part: str) -> Iterable[Row]:
    """The rows of a part of a data set on the hub, as they come.

    Raises:
        InputError: `datasets` is not installed.
        ConfLayersError: the hub can't be reached, or has no such data.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            "the papers' data come through Hugging Face's datasets: pip install datasets, give a "
            "--data-folder with files made elsewhere, or use --local"
        ) from None
    try:
        found = datasets.load_dataset(task.path, task.name, split=part, streaming=True)
        return list(islice(found, POOL))
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfLayersError(f"{task.path} can't be had from the hub: {why}") from error


def paper_prompts(
    name: str, shots: int, seed: int, folder: Path, rows: Rows = hub_rows
) -> TaskPrompts:
    """The prompts of a task: from the folder's files where they are there, else built and kept.

    Raises:
        InputError: a file there is no prompt file, or there is none and no `datasets` either.
        ConfLayersError: the data can't be had, or the files can't be written.
    """
    files = [
        folder / f"{name}-{shots}shot-seed{seed}-{kind}.jsonl" for kind in ("search", "figures")
    ]
    if not all(file.is_file() for file in files):
        made = built(name, shots, seed, rows)
        folder.mkdir(parents=True, exist_ok=True)
        for file, lines in zip(files, made, strict=True):
            text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
            write_atomically(file, text)
    search, figures = (tuple(read_prompts(file)) for file in files)
    return TaskPrompts(search, figures, raw=True)


def local_prompts(name: str, data: Path) -> TaskPrompts:
    """The prompts of Spec-Bench's category that is used for a task, for the two ends in turns.

    They are questions to an assistant, so the model's chat template is used where it has one.

    Raises:
        InputError: the file can't be read, or has fewer than two prompts of the category.
    """
    category = TASKS[name].category
    own = [prompt for prompt in read_prompts(data) if prompt.category == category]
    if len(own) < 2:
        raise InputError(f"{data}: has not two prompts of the category {category}, for {name}")
    return TaskPrompts(tuple(own[0::2]), tuple(own[1::2]), raw=False)
