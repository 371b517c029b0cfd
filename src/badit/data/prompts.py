"""The text of an instance's prompt."""

from typing import Literal, NamedTuple, get_args

from badit.data.tasks import Instance, Messages, Task
from badit.support.errors import refuse_unknown

PromptEncoding = Literal[
    "def",
    "def+pos1",
    "def+pos2",
    "def+pos3",
    "def+pos4",
    "def+pos5",
    "def+pos6",
    "def+pos7",
    "def+pos8",
    "def+pos9",
]
_INPUT = "Input: "
_OUTPUT = "\nOutput:"


class Prompt(NamedTuple):
    """The text of a prompt in three parts, which truncation treats differently.

    `history` has the (role, content) of a chat's earlier messages. `is_message`: the text is a user
    message.
    """

    head: str
    input: str
    tail: str
    history: Messages = ()
    is_message: bool = False

    @property
    def text(self) -> str:
        """The text without the history."""
        return self.head + self.input + self.tail


def build_prompt(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> Prompt:
    """Returns the prompt of one instance.

    "def" has only the definition, "def+posN" also the first N demonstrations. If a task has fewer
    than N demonstrations, all of them are used, as in the official evaluation. Without a definition
    the instance's input is the whole prompt.
    """
    refuse_unknown("encoding", encoding, get_args(PromptEncoding))
    definition = task.definition
    if instance.instruction is not None:
        definition = instance.instruction
    # A blank instruction of an instance is none, but a blank definition keeps the template.
    if definition is None or instance.instruction == "":
        return Prompt("", instance.input, "", instance.history, is_message=True)

    # Nothing is left of "def", which has no demonstrations.
    num_shots = int(encoding.removeprefix("def").removeprefix("+pos") or 0)
    # The white space is that of the official evaluation.
    head = "".join(
        f" Positive Example {number} -\n{_INPUT}{shot.input}\n Output: {shot.output}\n\n"
        for number, shot in enumerate(task.demonstrations[:num_shots], start=1)
    )
    if definition:
        head = f"{definition}\n\n{head}"
    head += f"Now complete the following example -\n{_INPUT}"
    return Prompt(head, instance.input, f"{_OUTPUT} ", instance.history)


def prompt_text(task: Task, instance: Instance, encoding: PromptEncoding = "def") -> str:
    """Returns the whole text of an instance's prompt with its chat history.

    This is the text before truncation and the chat template.
    """
    history = "".join(content for _, content in instance.history)
    return history + build_prompt(task, instance, encoding).text


def own_input(text: str) -> str:
    """Returns the instance's input from the text of its prompt.

    It is the whole text if this has no "Input: ", and is cut if the input itself has one.
    """
    # Demonstrations have the same labels and come first, so the last "Input: " counts.
    return text.rpartition(_INPUT)[2].partition(_OUTPUT)[0].strip()
