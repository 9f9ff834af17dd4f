"""Shapes of public chat templates, in our own words: what each writes around a turn's text.

A row: around a system text (empty: it has no place for it), a question, an answer, and what it
writes in front of an answer to come; and the token that ends an answer. `…` is the turn's text,
`OFF` what is written only where no thought is wanted, `LAST` only in a last answer.
"""

from dataclasses import dataclass

HEAD, TURN = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|im_start|>{}\n"
INST = "[INST]…[/INST]"


@dataclass(frozen=True)
class Shape:
    system: str
    user: str
    assistant: str
    opened: str
    end: str
    begin: str = ""  # of every prompt
    eos: bool = False  # prompt.answer_end=eos: its turns have no end
    refused: str = ""  # why it cannot be trained, in a part of what is said

    @property
    def template(self) -> str:
        "As Jinja."
        parts = zip(("system", "user", "assistant"), self.turns, strict=True)
        wrote = "".join(f"{{% if m.role == '{role}' %}}{text}{{% endif %}}" for role, text in parts)
        refuses = "{{ raise_exception('no system role') }}"
        first = f"{{% if messages[0].role == 'system' %}}{refuses}{{% endif %}}"
        return (
            f"{'' if self.system else first}{self.begin}{{% for m in messages %}}{wrote}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{marked(self.opened)}{{% endif %}}"
        )

    @property
    def turns(self) -> tuple[str, str, str]:
        return marked(self.system), marked(self.user), marked(self.assistant)


def marked(text: str) -> str:
    "With the marks of a row as Jinja."
    for mark, condition in (("OFF", "not enable_thinking"), ("LAST", "loop.last")):
        while f"{mark}(" in text:
            before, _, behind = text.partition(f"{mark}(")
            inside, _, after = behind.partition(f"){mark}")
            text = f"{before}{{% if {condition} %}}{inside}{{% endif %}}{after}"
    return text.replace("…", "{{ m.content }}")


def chatml(assistant="", opened=None, **more) -> Shape:
    "Qwen's and most others'; what stands in front of an answer that is given, or is to come."
    system, user, bot = (TURN.format(role) for role in ("system", "user", "assistant"))
    end = "<|im_end|>"
    opened = bot + (assistant if opened is None else opened)
    said = f"{bot}{assistant}…{end}\n"
    return Shape(f"{system}…{end}\n", f"{user}…{end}\n", said, opened, end, **more)


def llama(said="", opened=None, end="<|eot_id|>", **more) -> Shape:
    "Llama 3's and its kin's."
    system, user, bot = (HEAD.format(role) for role in ("system", "user", "assistant"))
    opened = bot + (said if opened is None else opened)
    return Shape(f"{system}…{end}", f"{user}…{end}", f"{bot}{said}…{end}", opened, end, **more)


def words(user, assistant, system="", **more) -> Shape:
    "Plain words, no token: `user` and `assistant` stand in front of their turns."
    said = f"{assistant} …\n\n"
    return Shape(
        f"{system}…\n\n", f"{user}…\n\n", said, assistant, "<|endoftext|>", eos=True, **more
    )


def kimi(assistant="") -> Shape:
    turn = "<|im_{0}|>{0}<|im_middle|>"
    system, user, bot = (turn.format(role) for role in ("system", "user", "assistant"))
    end = "<|im_end|>"
    return Shape(f"{system}…{end}", f"{user}…{end}", f"{bot}{assistant}…{end}", bot, end)


TOOLS = "Tools: <tools>{% for tool in tools %}{{ tool }}{% endfor %}</tools>\n"
EMPTY, R1 = "<think>\n\n</think>\n\n", "<|end_of_sentence|>"
SHAPES = {
    "ChatML": chatml(),
    "Qwen2.5": chatml(begin="{% if messages[0].role != 'system' %}I am Qwen.\n{% endif %}"),
    "Qwen3": chatml(f"LAST({EMPTY})LAST", f"OFF({EMPTY})OFF"),
    "Qwen3.5": chatml(f"LAST({EMPTY})LAST", f"OFF({EMPTY})OFF", begin="\n"),
    "Qwen3-Coder": chatml(begin="{% if tools %}{{ tools }}{% endif %}"),
    "QwQ with a switch": chatml("", "<think>\nOFF(</think>)OFF"),
    "Hermes 2 Pro, tools": chatml(begin=TOOLS),
    "Hermes 3, tools": chatml(begin=f"<s>{TOOLS}"),
    "LFM2": chatml(begin="<s>"),
    "Bielik": chatml(begin="<s>{% if tools is defined and tools %}{{ tools }}{% endif %}"),
    "Step 3.5": chatml("LAST(<think>\n\n</think>\n)LAST", "<think>\n", begin="<s>"),
    "Nemotron 3 Nano": chatml("<think></think>", "OFF(<think></think>)OFF"),
    "Llama 3": llama(begin="<s>"),
    "Llama 3.1": llama(begin="<s>{{ date_string }}\n"),
    "functionary 3.1": llama(begin=f"<s>{HEAD.format('system')}2023<|eot_id|>"),
    "functionary 3.2": llama(">>>all\n", ">>>"),
    "firefunction": llama(begin="{{ functions.strip() }}", refused="'functions' is undefined"),
    "Mistral": Shape("", "[INST] … [/INST]", " …</s>", "", "</s>", begin="<s>"),
    "Mistral Small 3.2": Shape(
        "[SYSTEM_PROMPT]…[/SYSTEM_PROMPT]", INST, "…</s>", "", "</s>", begin="<s>"
    ),
    "Llama 2": Shape("<<SYS>>\n…\n<</SYS>>\n\n", "<s>[INST] … [/INST]", " … </s>", "", "</s>"),
    "Mistral Nemo": Shape(
        "",
        "[INST]{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
        "{% endif %}…[/INST]",
        "…</s>",
        "",
        "</s>",
    ),
    "Phi-3": Shape(
        "<|system|>\n…<|end|>\n",
        "<|user|>\n…<|end|>\n",
        "<|assistant|>\n…<|end|>\n",
        "<|assistant|>\n",
        "<|end|>",
    ),
    "Phi-3 small": Shape(
        "<|system|>\n…<|end|>\n",
        "<|user|>\n…<|end|>\n",
        "<|assistant|>\n…<|end|>\nLAST(<|endoftext|>)LAST",
        "<|assistant|>\n",
        "<|end|>",
        begin="<s>",
    ),
    "Zephyr": Shape(
        "<|system|>\n…</s>\n",
        "<|user|>\n…</s>\n",
        "<|assistant|>\n…</s>\n",
        "<|assistant|>\n",
        "</s>",
    ),
    "Granite 4": Shape(
        "<|role|>system<|role_end|>…<|end|>\n",
        "<|role|>user<|role_end|>…<|end|>\n",
        "<|role|>assistant<|role_end|>…<|end|>\n",
        "<|role|>assistant<|role_end|>",
        "<|end|>",
    ),
    "GigaChat 3": Shape(
        "<s>developer system<|role_sep|>\n…<|message_sep|>\n\n",
        "user<|role_sep|>\n…<|message_sep|>\n\n",
        "assistant<|role_sep|>\n…<|message_sep|>\n\n",
        "assistant<|role_sep|>\n",
        "<|message_sep|>",
    ),
    "Kimi K2": kimi(),
    "Kimi K2 Thinking": kimi("<think></think>"),
    "Seed-OSS": Shape(
        "<|bos|>system\n…<|eos|>",
        "<|bos|>user\n…<|eos|>",
        "<|bos|>assistant\n…<|eos|>",
        "<|bos|>assistant\n",
        "<|eos|>",
    ),
    "GLM-4.6": Shape(
        "<|system|>\n…",
        "<|user|>\n…OFF(/nothink)OFF",
        "<|assistant|>\n<think></think>\n…",
        "<|assistant|>\nOFF(<think></think>)OFF",
        "<|user|>",
    ),
    "GLM-4.7": Shape(
        "<|system|>…", "<|user|>…", "<|assistant|></think>…", "<|assistant|></think>", "<|user|>"
    ),
    "Gemma": Shape(
        "",
        "<|turn|>user\n…<|turn_end|>\n",
        "<|turn|>model\n…<|turn_end|>\n",
        "<|turn|>model\n",
        "<|turn_end|>",
        begin="<s>",
    ),
    "Gemma 4": Shape(
        "<|turn|>system\n…<|turn_end|>\n",
        "<|turn|>user\n…<|turn_end|>\n",
        "<|turn|>model\n…<|turn_end|>\n",
        "<|turn|>model\nOFF(<|channel|>thought\n<|channel_end|>)OFF",
        "<|turn_end|>",
    ),
    "DeepSeek R1": Shape(
        "…", f"<|User|>…{R1}", f"<|Assistant|>…{R1}", "<|Assistant|><think>\n", R1, begin="<s>"
    ),
    "R1-distill with a switch": Shape(
        "…", "<|User|>…", f"<|Assistant|>…{R1}", "<|Assistant|><think>\nOFF(</think>)OFF", R1
    ),
    "DeepSeek V3.1": Shape(
        "…",
        "<|User|>…",
        f"<|Assistant|><think></think>…{R1}",
        "<|Assistant|><think>OFF(</think>)OFF",
        R1,
    ),
    "Command R7B with a switch": Shape(
        "<|turn|><|system|>…<|end|>",
        "<|turn|><|user|>…<|end|>",
        "<|turn|><|bot|><|START_RESPONSE|>…<|END_RESPONSE|><|end|>",
        "<|turn|><|bot|>OFF(<|START_THINKING|><|END_THINKING|>)OFF",
        "<|END_RESPONSE|>",
    ),
    "Command R+, tools": Shape(
        "<|turn|><|system|>…<|end|>",
        "<|turn|><|user|>…<|end|>",
        "<|turn|><|bot|>…<|end|>LAST(<|turn|><|system|>Write 'Action:'<|end|>)LAST",
        "<|turn|><|system|>Write 'Action:'<|end|><|turn|><|bot|>",
        "<|end|>",
        refused="is not the beginning",
    ),
    "MiniMax M2": Shape(
        "]~b]system\n…[e~[\n",
        "]~b]user\n…[e~[\n",
        "]~b]ai\n…[e~[\n",
        "]~b]ai\n<think>\n",
        "[e~[",
        begin="]~!b[",
    ),
    "Nemotron Nano 2": Shape(
        "<SPECIAL_10>System\n…\n\n",
        "<SPECIAL_11>User\n…\n",
        "<SPECIAL_11>Assistant\nLAST(<think></think>)LAST…\n<SPECIAL_12>\n",
        "<SPECIAL_11>Assistant\n<think>OFF(</think>)OFF",
        "<SPECIAL_12>",
    ),
    "Apertus": Shape(
        "<|system_start|>…<|system_end|>",
        "{% if not loop.first and loop.previtem.role == 'assistant' %}<|assistant_end|>{% endif %}"
        "<|user_start|>…<|user_end|>",
        "<|assistant_start|>…",
        "<|assistant_start|>",
        "<|assistant_end|>",
    ),
    "Apriel 1.5": Shape(
        "<|system|>\n…\n<|end|>\n",
        "<|user|>\n…\n<|end|>\n",
        "<|assistant|>\n…\n<|end|>\n",
        "<|assistant|>\n",
        "<|end|>",
    ),
    "Apriel 1.6 Thinker": Shape(
        "<|begin_system|>\n…\n",
        "<|begin_user|>\n…",
        "\n<|begin_assistant|>\n…\n<|end|>\n",
        "\n<|begin_assistant|>\nHere are my reasoning steps:\n",
        "<|end|>",
        refused="is not the beginning",
    ),
    "Solar Open": Shape(
        "<|begin|>system<|content|>…<|end|>",
        "<|begin|>user<|content|>…<|end|>",
        "<|begin|>assistant<|content|>…<|end|>",
        "<|begin|>assistant",
        "<|end|>",
    ),
    "OpenChat": Shape(
        "…<|end_of_turn|>",
        "GPT4 Correct User: …<|end_of_turn|>",
        "GPT4 Correct Assistant: …<|end_of_turn|>",
        "GPT4 Correct Assistant:",
        "<|end_of_turn|>",
    ),
    "Saiga": Shape("<s>system\n…</s>", "<s>user\n…</s>", "<s>bot\n…</s>", "<s>bot\n", "</s>"),
    "Alpaca": Shape(
        "…\n\n",
        "### Instruction:\n…\n\n",
        "### Response:\n…</s>\n\n",
        "### Response:\n",
        "</s>",
    ),
    "Vicuna": Shape("…\n\n", "USER: …\n", "ASSISTANT: …</s>\n", "ASSISTANT:", "</s>"),
    "Solar": words("### User:\n", "### Assistant:", "### System:\n"),
    "Falcon": words("User: ", "Assistant:"),
    "ChatQA": words("User: ", "Assistant:", "System: ", begin="<s>"),
    "AmberChat": words("###Human: ", "###Assistant:"),
    "RWKV": words("User: ", "Assistant:", "System: "),
}
TOKENS = [
    "<s>",
    "</s>",
    "<think>",
    "</think>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "]~b]",
    "]~!b[",
    "[e~[",
    "<|User|>",
    "<|Assistant|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|end_of_sentence|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|role|>",
    "<|role_end|>",
    "<|role_sep|>",
    "<|message_sep|>",
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|bos|>",
    "<|eos|>",
    "<|turn|>",
    "<|turn_end|>",
    "<|channel|>",
    "<|channel_end|>",
    "<|bot|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<SPECIAL_10>",
    "<SPECIAL_11>",
    "<SPECIAL_12>",
    "<|system_start|>",
    "<|system_end|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|begin_system|>",
    "<|begin_user|>",
    "<|begin_assistant|>",
    "<|begin|>",
    "<|content|>",
    "<|end_of_turn|>",
]
