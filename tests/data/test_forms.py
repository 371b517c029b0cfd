"""Forms of rows: what each becomes, and rows that are refused with their line and field."""

import pytest

from badit.data import Instance, Source, build_prompt, load_tasks
from badit.data.forms import FORMS
from data.examples import CHAT, refusal, task_of, write_rows
from docs.pages import Page

LINE = {
    "task": "capitals",
    "instruction": "Name the capital.",
    "input": "France",
    "output": "Paris",
}
PRETOKENIZED = {"inputs_pretokenized": "Good?", "targets_pretokenized": "no"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
SHARE_GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "Square it.", "input": 0, "output": "0"}, "Square it.\n\n0", "0"),
        (
            {"instruction": "Name it.", "input": "x", "output": "y", "text": ""},
            "Name it.\n\nx",
            "y",
        ),
        ({"instruction": "Say hello.", "output": "hello"}, "Say hello.", "hello"),
        ({"instruction": "", "input": "France?", "output": "Paris"}, "France?", "Paris"),
        ({"instruction": "", "question": "Why?", "answer": "So."}, "Why?", "So."),
        ({"question": "Why?", "answer": "So."}, "Why?", "So."),
        ({"inputs": "1 + 1 =", "targets": "2", "task_source": "Flan2021"}, "1 + 1 =", "2"),
        ({**PRETOKENIZED, "inputs": [3], "targets": [5]}, "Good?", "no"),
        ({"input": "1 + 1", "output": 2}, "1 + 1", "2"),
        ({"input": 7, "output": 0.5}, "7", "0.5"),
        ({"prompt": CHAT[1:2], "completion": CHAT[2:3]}, "Capital of France?", "Paris"),
        ({"messages": CHAT}, "And of Peru?", "Lima"),
        ({"messages": CHAT, "prompt": CHAT[0]["content"]}, "And of Peru?", "Lima"),
        ({"messages": [PARTS, CHAT[2]]}, "Hi", "Paris"),
        ({"conversations": SHARE_GPT}, "Hi", "Ho"),
    ],
)
def test_rows_without_a_task(tmp_path, row, prompt, answer):
    file = write_rows(tmp_path / "rows.jsonl", row)
    task = task_of(file)
    assert (task.name, task.definition) == ("rows", None)
    assert (task.train[0].input, task.train[0].outputs) == (prompt, (answer,))
    assert task_of(file, task="mine").name == "mine"


USER, BEST, WORST = (
    {"role": role, "content": text}
    for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No idea."))
)
CHATS = {"chosen": [USER, BEST], "rejected": [USER, WORST]}
TEXTS = {"prompt": "Why?", "chosen": "So.", "rejected": "No idea."}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (TEXTS, {}),
        (CHATS, {}),
        ({"prompt": [USER], "chosen": [BEST], "rejected": [WORST]}, {}),
        ({**CHATS, "prompt": "Why?", "messages": [USER, BEST]}, {}),
        (
            {"question": "Why?", "good": "So.", "bad": "No idea."},
            {"input": "question", "output": "good", "rejected": "bad"},
        ),
    ],
)
def test_preferences(tmp_path, row, columns):
    task = task_of(write_rows(tmp_path / "rows.jsonl", row), columns=columns)
    assert task.has_preferences
    (instance,) = task.train
    assert (instance.input, instance.outputs, instance.rejected) == ("Why?", ("So.",), "No idea.")
    assert instance.history == ()
    chosen = instance.model_copy(update={"rejected": None})
    assert (
        instance.hash != chosen.hash == Instance(id="rows-0", input="Why?", outputs=("So.",)).hash
    )


@pytest.mark.parametrize("column", ["chosen", "messages"])
def test_a_named_chat_of_preferences_is_a_plain_chat(tmp_path, column):
    row = {**CHATS, "messages": [USER, BEST]}
    task = task_of(write_rows(tmp_path / "rows.jsonl", row), columns={"messages": column})
    assert not task.has_preferences
    assert task.train[0].outputs == ("So.",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "rejected: missing in a row of preference data"),
        ({"prompt": None}, "prompt: missing in a row of preference data"),
        ({"rejected": "So. "}, "rejected: equals the chosen answer; remove the row"),
        ({"rejected": " "}, "rejected: must be an answer that is not blank"),
        ({"chosen": " "}, "chosen: must hold at least one answer that is not blank"),
        ({"chosen": [BEST]}, "prompt, chosen, rejected: must all be text, or all lists"),
        ({"rejected": {"a": 1}}, "rejected: input should be a valid string"),
        (
            {**CHATS, "rejected": [BEST, USER, WORST]},
            "rejected: must differ from chosen in the last message only",
        ),
        ({**CHATS, "rejected": [WORST]}, "rejected: messages.0: an assistant message must follow"),
        ({**CHATS, "chosen": [USER]}, "chosen: messages: there is no assistant message"),
    ],
)
def test_preferences_are_refused_with_their_field(tmp_path, change, message):
    assert f"line 1: {message}" in refusal(write_rows(tmp_path / "rows.jsonl", {**TEXTS, **change}))


def test_documentation_lists_the_columns_of_every_form():
    page = Page("docs/own-tasks.md").text
    assert {name for form in FORMS for name in form.columns if f"`{name}`" not in page} == set()


def test_instances_of_tasks_in_one_file(tmp_path):
    bare = {"task": "advice", "instruction": "Give advice.", "outputs": ["Rest.", ""]}
    third = {**LINE, "id": "x", "input": "Peru\u2028!", "split": "test"}
    file = write_rows(tmp_path / "all.jsonl", LINE, {**bare, "split": "validation"}, third)
    file.write_text(file.read_text().replace("\n", "\r\n\r\n"), newline="")
    advice, capitals = load_tasks(file)
    assert (advice.name, advice.definition) == ("advice", "Give advice.")
    assert advice.validation[0] == Instance(id="advice-0", input="", outputs=("Rest.", ""))
    assert [i.id for i in (*capitals.train, *capitals.test)] == ["capitals-0", "x"]
    assert capitals.test[0].input == "Peru\u2028!"
    assert load_tasks(Source(file, "jsonl"), tasks=["capitals"]) == [capitals]
    write_rows(file, {"task": "a", "input": "x", "outputs": ["y", "z"], "id": 0})
    assert task_of(file).train[0] == Instance(id="0", input="x", outputs=("y", "z"))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_task_may_have_several_instructions_and_empty_inputs(tmp_path, suffix):
    row = {"topic": "sums", "do": "Add.", "context": "1 1", "answer": "2"}
    greeting = {"topic": "sums", "do": "Greet.", "context": None, "answer": "Hi"}
    columns = {"task": "topic", "instruction": "do", "input": "context", "output": "answer"}
    task = task_of(write_rows(tmp_path / f"alpaca.{suffix}", row, greeting), columns=columns)
    assert (task.name, [instance.input for instance in task.train]) == ("sums", ["1 1", ""])
    heads = [build_prompt(task, instance).head for instance in task.train]
    assert [head.split("\n")[0] for head in heads] == ["Add.", "Greet."]

    file = write_rows(tmp_path / f"some.{suffix}", row, {**row, "do": None})
    task = task_of(file, columns=columns)
    assert build_prompt(task, task.train[1]).is_message, "it has no instruction of another row"
    task = task_of(file, columns=columns, instruction="Say it.")
    assert build_prompt(task, task.train[1]).head.startswith("Say it.")


def test_a_chat_may_have_another_column(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", {"user": "me", "talk": CHAT})
    assert task_of(file, columns={"messages": "talk"}).train[0].outputs == ("Lima",)


def test_mapped_columns_decide_the_form(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", {"text": "x", "output": "y", "context": "z"})
    assert task_of(file, columns={"input": "text"}).train[0].input == "x"
    both = {"messages": CHAT, "prompt": "a", "completion": "b", "ask": "c", "say": "d"}
    columns = {"input": "ask", "output": "say"}
    assert task_of(write_rows(file, both), columns=columns).train[0].input == "c"
    for row in ({"messages": CHAT}, {"prompt": "Why?", "completion": "So."}):
        write_rows(file, {**row, "about": "Do."})
        assert task_of(file, columns={"instruction": "about"}).definition == "Do."
    missing = Source(file, columns={"input": "txt"})
    assert "line 1: data.columns: there is no column 'txt'; found: prompt, com" in refusal(missing)


def test_system_column_is_the_first_message_and_all_turns_become_instances(tmp_path):
    row = {"messages": CHAT, "id": "x"}
    task = task_of(write_rows(tmp_path / "chat.jsonl", row), turns="all")
    expected = [("x", "Capital of France?", ("Paris",), 1), ("x-1", "And of Peru?", ("Lima",), 3)]
    assert [(i.id, i.input, i.outputs, len(i.history)) for i in task.train] == expected
    row = {"system": CHAT[0]["content"], "conversations": CHAT[1:], "id": "x"}
    assert task_of(write_rows(tmp_path / "chat.jsonl", row), turns="all") == task


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LINE, "output": " "}, "output: must hold at least one answer that is not blank"),
        ({**LINE, "output": {"text": "a"}}, "output: must be a text or a list of texts"),
        ({**LINE, "outputs": ["a"]}, "output, outputs: a row has one of them; remove the other"),
        ({"task": "a", "instruction": "b"}, "unknown form of row: found task, instruction; name"),
        ({**LINE, "inptu": "x"}, "inptu: unknown key (did you mean 'input'?)"),
        ({**LINE, "split": "later"}, "split: input should be 'train', 'validation' or 'test'"),
        ({**LINE, "task": "../escape"}, "task: '../escape' cannot be a file name"),
        ({"instruction": "a", "inptu": "b", "output": "c"}, "found 'inptu', did you mean 'input'?"),
        (
            {"task": "a", "instrution": "b", "input": "c", "output": "d"},
            "found 'instrution', did you mean 'instruction'?",
        ),
        ({"input": "a", "output": None}, "output: has no answer; remove the row"),
        ({"context": "b", "question": "c", "answer": "d"}, "context: not used in a row with quest"),
        ({"instruction": "b", "system": "c", "output": "d"}, "system: not used in a row with inst"),
        (
            {"instruction": "b", "question": "c", "answer": "d"},
            "instruction: not used in a row with question and answer; name the columns with",
        ),
        ({"messages": CHAT, "instruction": "b"}, "instruction: not used in a row with messages; "),
        ({"messages": CHAT, "tools": ["f"]}, "tools: not used in a row with messages"),
        (
            {"messages": CHAT[:2]},
            "messages: there is no assistant message (roles: system, user); add",
        ),
        (
            {"messages": [{**CHAT[2], "role": "Assistant"}]},
            "messages: there is no assistant message (roles: Assistant)",
        ),
        (
            {"messages": [CHAT[0], CHAT[2]]},
            "messages.1: an assistant message must follow a user message, not 'system'",
        ),
        ({"messages": CHAT[2:3]}, "messages.0: an assistant message must follow a user message"),
        ({"messages": "[]"}, "messages: must be a list of messages, not '[]'"),
        ({"messages": [{**CHAT[0], "tool_calls": ["f"]}]}, "messages.0: tool_calls: not used"),
        (
            {"messages": [{**CHAT[0], "function_call": {"name": "f"}}]},
            "messages.0: function_call: not used; remove it",
        ),
        (
            {"messages": [{**CHAT[0], "reasoning_content": "So"}]},
            "messages.0: reasoning_content: not used; remove",
        ),
        ({"messages": [{**CHAT[0], "content": None}]}, "messages.0: must have a role and text"),
        (
            {"prompt": CHAT[1:2], "completion": "b"},
            "prompt, completion: must both be text, or both lists",
        ),
        (
            {"prompt": "a", "completion": CHAT[2:3]},
            "prompt, completion: must both be text, or both lists",
        ),
        (
            {"user": "me", "talk": CHAT},
            "unknown form of row: found user, talk; name the columns with data.columns.input="
            "COLUMN data.columns.output=COLUMN; if 'talk' is a chat, with",
        ),
    ],
)
def test_invalid_rows_are_refused_with_their_line(tmp_path, row, message):
    file = write_rows(tmp_path / "rows.jsonl", row)
    assert refusal(file).startswith(f"{file}: line 1: {message}")


def test_rows_that_contradict_others_are_refused(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", LINE, {**LINE, "instruction": "Other."})
    message = f"{file}: line 2: instruction: differs from other rows of task 'capitals'"
    assert refusal(file).startswith(message)
    file = write_rows(file, LINE, ["France", "Paris"])
    assert refusal(file).startswith(f"{file}: line 2: must be an object with keys, not ['France")
    file = write_rows(file, *[{**LINE, "id": "same"}] * 2)
    message = f"{file}: task 'capitals': train: two instances have the id 'same'"
    assert refusal(file).startswith(message)
