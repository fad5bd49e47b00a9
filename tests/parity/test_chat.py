"""Conversations are written as `transformers` writes them; templates that fail, loop or pry are short errors."""

import json

import numpy as np
import pytest
from tiny_tokenizers import byte_level, folder

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.filterwarnings("default")

from transformer.data.tokenizers import chat  # noqa: E402
from transformer.data.tokenizers.chat import ChatTemplate, chat_ids, chat_of, learnt_ids  # noqa: E402
from transformer.data.tokenizers.folder import from_folder  # noqa: E402
from transformer.data.tokenizers.pretrained import CHAT_FILE  # noqa: E402
from transformer.types import UserError  # noqa: E402

CHATML = """{% for message in messages %}
<|turn|>{{ message['role'] }}
{{ message['content'] | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
<|turn|>assistant
{% endif %}
"""
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>' + system + '<</SYS>>' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HELPERS = (
    "{{ bos_token }}{%- set ns = namespace(count=0) -%}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "{% set ns.count = ns.count + 1 %}{{ m | tojson }}{{ ns.count }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true) }}"
    "{% endfor %}{{ strftime_now('%Y') }}{{ tools is none }}{{ dict(a=1) }}{{ unknown_name }}{{ pad_token is defined }}"
    "{% generation %}x{% endgeneration %}"
)
TEMPLATES = {"chatml": CHATML, "llama 2": LLAMA_2, "helpers": HELPERS}
USER = {"role": "user", "content": " the café </s>\n"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": 'be "kind" 😀'}, USER],
    [USER, {"role": "assistant", "content": "yes"}, USER, {"role": "assistant", "content": "no  \n"}],
]


def opened(path, template, **more):
    directory = folder(path, byte_level(), {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **more})
    return load(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def load(directory):
    kind, files = from_folder(directory)
    for name, content in files.items():
        (directory / "run").mkdir(exist_ok=True)
        (directory / "run" / name).write_bytes(content)
    return kind.open(directory / "run")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("reply", [False, True])
def test_a_conversation_is_written_as_transformers_writes_it(template, reply, tmp_path):
    ours, theirs = opened(tmp_path, TEMPLATES[template])
    for messages in CONVERSATIONS:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        assert chat_of(ours).render(messages, reply=reply) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
        np.testing.assert_array_equal(chat_ids(ours, messages, reply=reply), ids)


def test_templates_are_found_in_each_file(tmp_path):
    named = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "rag", "template": "R"}]
    ours, theirs = opened(tmp_path / "list", named)
    assert chat_of(ours).render([USER]) == theirs.apply_chat_template([USER], tokenize=False) == "D<s>"
    assert chat_of(ours).templates == theirs.chat_template
    directory = folder(tmp_path / "file", byte_level(), {"eos_token": "</s>", "chat_template": "no"})
    (directory / "chat_template.jinja").write_text("F{{ eos_token }}")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert chat_of(load(directory)).render([USER]) == theirs.apply_chat_template([USER], tokenize=False) == "F</s>"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert (
        chat_of(load(directory)).templates == theirs.chat_template == {"default": "F{{ eos_token }}", "tool_use": "T"}
    )


def test_a_template_is_kept_with_the_run(tmp_path):
    ours, _ = opened(tmp_path, CHATML)
    ours.save(tmp_path / "again")
    assert (tmp_path / "again" / CHAT_FILE).read_bytes() == (tmp_path / "run" / CHAT_FILE).read_bytes()
    assert ours.settings.open(tmp_path / "again").chat_file == ours.chat_file
    with pytest.raises(UserError, match=r"needs? a chat template|need a chat template"):
        chat_of(load(folder(tmp_path / "none", byte_level(), {"eos_token": "</s>"})))


BAD = {
    "refuses": ("{{ raise_exception('no system here') }}", "refuses these messages: no system here"),
    "syntax": ("{% for %}", "failed on 1 messages"),
    "undefined": ("{{ messages[9].content.x }}", "failed on 1 messages"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed on 1 messages"),
    "namespace": ("{% set ns = namespace(__class__=1) %}", "underscore"),
    "changes": ("{{ messages.append(1) }}", "failed on 1 messages"),
    "loops": (
        "{% for i in range(90000) %}{% for j in range(90000) %}{% set x = i %}{% endfor %}{% endfor %}",
        "done in",
    ),
    "long": ("{% for i in range(900) %}{{ 'x' * 100000 }}{% endfor %}", "at most 16,777,216 characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_a_short_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.5 if name == "loops" else 60.0)  # a slow machine is no endless loop
    template, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        chat_of(opened(tmp_path, template)[0]).render([USER])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("template", [{"a": 1}, [{"name": "default"}], 7])
def test_a_template_of_another_type_is_refused(template, tmp_path):
    directory = folder(tmp_path, byte_level(), {"eos_token": "</s>", "chat_template": template})
    with pytest.raises(UserError, match="must be a text, or a list of name and template"):
        from_folder(directory)


def test_other_templates_need_a_default(tmp_path):
    with pytest.raises(UserError, match="must be named default"):
        ChatTemplate({"rag": "x"}, {}).render([USER])
    damaged = json.dumps({"templates": {"default": 3}, "tokens": {}}).encode()
    tokenizer, _ = opened(tmp_path, CHATML)
    tokenizer.chat_file = damaged
    with pytest.raises(UserError, match="damaged"):
        chat_of(tokenizer)


# ---- What is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "llama 2"])
def test_replies_are_learnt_and_nothing_else(template, tmp_path):
    ours, theirs = opened(tmp_path, TEMPLATES[template])
    messages = CONVERSATIONS[2]
    ids, learnt = learnt_ids(ours, messages)
    np.testing.assert_array_equal(ids, theirs.apply_chat_template(messages, return_dict=False))
    runs = np.split(ids, np.flatnonzero(np.diff(learnt)) + 1)
    said = [theirs.decode(run) for run in runs[1::2]]
    assert not learnt[0]
    assert said == {"chatml": ["yes</s>\n", "no</s>\n"], "llama 2": [" yes </s>", " no </s>"]}[template]


def test_a_template_that_rewrites_history_is_refused(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}{% if loop.last %} last{% endif %}]{{ m.content }}{% endfor %}"
    ours, _ = opened(tmp_path, template)
    with pytest.raises(UserError, match=r"does not at message 2: .* instead of"):
        learnt_ids(ours, CONVERSATIONS[2])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(chat, "jinja2", None)
    with pytest.raises(UserError, match=r'needs the package jinja2; .*pip install -e "\.\[chat\]"'):
        ChatTemplate({"default": "a template of this test"}, {}).render([USER])
