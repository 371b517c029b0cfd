"""Small tasks and tokenizers shared by tests."""

import json

import datasets
import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from badit.data import Demonstration, Instance, Source, Task, encode_prompts, load_tasks
from refusals import refuses

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes BOS itself, strips assistant messages, and adds a space before EOS.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Ends an assistant message with plain text, without a special token.
UNMARKED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

_TURNS = [
    ("system", "Be brief."),
    ("user", "Capital of France?"),
    ("assistant", "Paris"),
    ("user", "And of Peru?"),
]
CHAT = [{"role": role, "content": content} for role, content in [*_TURNS, ("assistant", "Lima")]]
ROWS = [
    {"task": "capitals", "instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {
        "task": "capitals",
        "instruction": "Name the capital.",
        "input": 'Peru, "the" one',
        "output": "Lima",
    },
    {"task": "sums", "instruction": "Add.", "input": "1 + 1", "output": "2"},
]
HELLO = {"prompt": "Say hello", "completion": "hello"}
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LINES = [
    "Answer with the capital of the country.",
    "Now complete the following example -\nInput: France\nOutput: Paris",
    " Positive Example 1 -\nInput: Italy\n Output: Rome",
    "user assistant system [INST] [/INST]",
]


def make_tokenizer(*, adds="<s> $A", chat_template=None, **options):
    """Returns a byte-level BPE tokenizer for any text; `adds` is its template of special tokens."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    fixed = {"special_tokens": SPECIALS, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    model.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, show_progress=False, **fixed)
    )
    ids = [(token, model.token_to_id(token)) for token in ("<s>", "</s>")]
    model.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    options = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": SPECIALS[3:],
        **options,
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=64, **options)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_task(name="capitals", train=8, test=4, **fields):
    return Task(
        name=name,
        definition="Answer with the capital of the country.",
        demonstrations=(
            Demonstration(input="Italy", output="Rome"),
            Demonstration(input="Peru", output="Lima"),
        ),
        train=tuple(
            Instance(id=f"a{i}", input=f"country {i}", outputs=(f"city {i}",)) for i in range(train)
        ),
        test=tuple(
            Instance(id=f"b{i}", input=f"land {i}", outputs=(f"town {i}",)) for i in range(test)
        ),
        **fields,
    )


def encode_prompt(tokenizer, prompt, max_source_tokens=100, **options):
    (ids,) = encode_prompts(tokenizer, [prompt], max_source_tokens=max_source_tokens, **options)
    return ids


def write_animals(file, train):
    """Writes a task, with two test rows, that is unlike those of the other tests."""
    rows = [
        {"task": "animals", "instruction": "Say which animal lives there.", "input": f"forest {i}"}
        | {"output": "a fox", "split": "train" if i < train else "test"}
        for i in range(train + 2)
    ]
    return write_rows(file, *rows)


def write_pairs(file):
    """Writes preference data of two tasks, each with 24 training and 4 test rows."""
    rows = [
        {"task": task, "prompt": f"Name {task} {number}.\n", "chosen": f"{task} {number}"}
        | {"rejected": f"no {task}", "split": "train" if number < 24 else "test"}
        for task in ("cities", "rivers")
        for number in range(28)
    ]
    return write_rows(file, *rows)


def write_rows(file, *rows):
    """Writes rows in the format of the file's suffix; any other suffix writes a saved dataset."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix in (".csv", ".tsv"):
        pd.DataFrame(rows).to_csv(file, index=False, sep="," if file.suffix == ".csv" else "\t")
    elif file.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        data = datasets.Dataset.from_list([*rows])
        if file.suffix == ".arrow":
            data.save_to_disk(file.with_suffix(""))
            (file.with_suffix("") / "data-00000-of-00001.arrow").rename(file)
        else:
            datasets.DatasetDict({"train": data}).save_to_disk(file)
    return file


def task_of(path, **options):
    """Returns the only task of a source."""
    (task,) = load_tasks(Source(path, **options))
    return task


def refusal(source, **options):
    """Returns the one-line error raised when a source is loaded."""
    return refuses(".", load_tasks, source, **options)
