"""What a suite file may say: probes of several kinds, each with its items.

Paths are relative to the file that they stand in; a file may extend another, and adds to its probes. Every probe scores all of
its items at every look, or the same some of them, so that each can be compared with itself at step 0.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cpt_mega.config.schema import NonNegativeInt, PositiveInt, Section

Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
Bucket = Literal["domain", "general", "behaviour", "safety"]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ProbeOptions(Section):
    bucket: Bucket = Field(description="the bucket its score counts for")
    max_items: PositiveInt | None = Field(None, description="items that are scored at most; none: all")


class PerplexityOptions(ProbeOptions):
    kind: Literal["perplexity"]
    items: str = Field(description="JSONL with a text field, or the prefix of a corpus' .bin and .idx files")
    field: str = Field("text", description="of a JSONL line, which has the text")
    max_tokens: PositiveInt = Field(262_144, description="tokens that are scored, from the start")


class FewShotOptions(ProbeOptions):
    items: str = Field(description="JSONL, or MMLU's CSV, with questions and answers")
    shots: NonNegativeInt = Field(0, description="items from the start of the file that are shown and never scored")


class ChoiceOptions(FewShotOptions):
    kind: Literal["choice"]
    style: Literal["cloze", "letters", "continuation", "reply"] = Field(
        "cloze",
        description="cloze: each choice behind 'Answer:'; letters: choices are listed, and their letters scored; "
        "continuation: each choice behind the text; reply: as the assistant's, behind what a user says",
    )
    chat: bool | None = Field(
        None, description="reply: as the tokenizer's chat template has it; none: where there is one"
    )
    metric: Literal["acc", "acc_norm"] | None = Field(
        None, description="what gates compare: the likeliest choice, or the likeliest per byte; none: acc for letters"
    )


class AnswerOptions(FewShotOptions):
    kind: Literal["answers"]


class ListOptions(ProbeOptions):
    kind: Literal["lists"]
    count: PositiveInt = Field(200, description="items that are generated")
    shots: PositiveInt = Field(6, description="examples in each")
    longest: int = Field(5, ge=3, le=26, description="numbers in a list at most")
    seed: NonNegativeInt = Field(1, description="of the generated lists")


class BoundaryOptions(ProbeOptions):
    kind: Literal["boundaries"]
    items: str = Field(description="JSONL of pairs of documents: first, second, target")


class DriftOptions(ProbeOptions):
    kind: Literal["drift"]
    items: str = Field(description="JSONL of chats (messages), or of lines with a text field")
    field: str = Field("text", description="of a line that is no chat, which has the text")
    count: PositiveInt = Field(64, description="likeliest tokens of the base that are kept at each place")


class HarnessOptions(ProbeOptions):
    kind: Literal["harness"]
    task: str = Field(min_length=1, description="a task of lm-evaluation-harness that is answered by likelihoods")
    tasks: str | None = Field(None, description="folder of task files; none: those that come with lm-eval")
    shots: NonNegativeInt | None = Field(None, description="examples that are shown; none: as the task has it")
    metric: str | None = Field(None, description="what gates compare; none: the task's first that each item has")
    max_length: PositiveInt | None = Field(
        None, description="tokens of a text that are read, cut off on the left; none: all that the model can read"
    )


AnyProbe = Annotated[
    PerplexityOptions | ChoiceOptions | AnswerOptions | ListOptions | BoundaryOptions | DriftOptions | HarnessOptions,
    Field(discriminator="kind"),
]


Action = Literal["warn", "stop", "roll_back", "anneal"]


class ItemRuleOptions(Section):
    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="drop since step 0 that it is for; none: the usual one, or what the items can show",
    )
    action: Action | None = Field(None, description="what is done about a confirmed drop; none: gates.action")
    patience: PositiveInt = Field(1, description="looks one behind the other that have to confirm it")
    accept_blind: bool = Field(False, description="the threshold stands though the items are too few to show it")


class GainRuleOptions(Section):
    threshold: float = Field(
        0.005, ge=0, lt=1, description="least fall of the domain loss since step 0, as a share of it"
    )
    price: float | None = Field(
        None, gt=0, description="least fall (nats) per billion tokens between two looks; none: any"
    )
    patience: PositiveInt = Field(3, description="looks one behind the other that have to miss it")
    action: Action = Field("stop", description="what is done then")


class RuleOptions(Section):
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="chance that gates of items alarm in a run that has no such drop"
    )
    general: ItemRuleOptions | None = Field(ItemRuleOptions(), description="right-or-wrong items; usually 3 points")
    behaviour: ItemRuleOptions | None = Field(ItemRuleOptions(), description="right-or-wrong items; usually 5 points")
    safety: ItemRuleOptions | None = Field(ItemRuleOptions(), description="right-or-wrong items; usually 3 points")
    answers: ItemRuleOptions | None = Field(
        ItemRuleOptions(), description="gold answers of these buckets; usually 10 % of their bits per byte"
    )
    gain: GainRuleOptions | None = Field(GainRuleOptions(), description="whether the domain becomes better at all")
    functions: tuple[str, ...] = Field((), description="rules of your own: path/to/file.py:function")


class WeightOptions(Section):
    domain: NonNegativeFloat = Field(1.0, description="what the gain counts for in the choice of a checkpoint")
    general: NonNegativeFloat = Field(1.0, description="what a regression of that bucket counts for")
    behaviour: NonNegativeFloat = Field(1.0, description="the same")
    safety: NonNegativeFloat = Field(1.0, description="the same")


class SuiteOptions(Section):
    name: str = Field(min_length=1, description="of the suite, in results")
    rules: RuleOptions = Field(RuleOptions(), description="what is done about what is measured")
    row_tokens: PositiveInt = Field(2048, description="of the rows that items are packed into")
    weights: WeightOptions = Field(WeightOptions(), description="of the buckets, when a checkpoint is chosen")
    probes: dict[Name, AnyProbe] = Field(min_length=1, description="what is measured, by a name for results")
