"""lm-evaluation-harness as a library: its tasks, asked of a model that is split over processes.

``RequestMaker`` goes lm-eval's way from texts to tokens, as its own ``HFLM`` does, so that results may be compared;
``HarnessModel`` has them answered, packed and at any layout. Every rank runs lm-eval, with the same texts in the same order,
and has the same results.

Needs the extra ``harness``. Importing this raises InputError where it is not installed.
"""

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.gates.asking import score_requests
from cpt_mega.gates.requests import Likelihood, Request
from cpt_mega.gates.undisturbed import undisturbed

with undisturbed():  # it sets variables of the hub's when it is imported
    try:
        import lm_eval.tasks
        from lm_eval import utils
        from lm_eval.api.metrics import mean
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.task import Task
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    except ImportError as error:
        fix = "install it with: bash launch/install.sh harness (or pip install 'cpt_mega[harness]')"
        raise InputError("lm-eval", f"not there ({error})", fix) from None

__all__ = [
    "VERSION",
    "HarnessModel",
    "RequestMaker",
    "Task",
    "build_task",
    "load_tokenizer",
    "mean",
    "response",
    "seeded",
]
VERSION: str = lm_eval.__version__
Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and the tokens before and those scored


class RequestMaker(TemplateLM):
    """A model that answers with the requests it would ask: one for each context and continuation, a list for each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int):
        """``longest``: tokens of a text that the model reads; what is before them is cut off."""
        super().__init__()
        self.tokenizer, self._longest = tokenizer, longest
        self._prefix = tokenizer.decode(self.prefix_token_id)

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text that begins with a scored token is read behind."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._longest

    @property
    def tokenizer_name(self) -> str:
        """Of the folder that it was read from."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids; special tokens around them by the tokenizer's own habit, unless they are asked for or there already."""
        if add_special_tokens is None and string.startswith(self._prefix):
            add_special_tokens = False
        words = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **words)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list:
        """Windows that lie beside each other; the first token of each but the first is behind the last one of that before."""
        return [self._of_text(each.args[0]) for each in requests]

    def _of_text(self, text: str) -> list[Request]:
        windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [self._request((None, *utils.make_disjoint_window(window))) for window in windows]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs) -> list:
        return [self._request(each) for each in requests]

    def _request(self, pair: Pair) -> Request:
        texts, before, scored = pair
        if not scored or len(scored) > self.max_length:
            shown = scored if texts is None else texts[1]
            fix = f"a continuation must have 1 to {self.max_length} tokens, and this one has {len(scored)}"
            raise InputError("lm-eval request", shown, fix)
        tokens = np.array((before + scored)[-(self.max_length + 1) :], np.int64)
        return Request(tokens, len(tokens) - len(scored))

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Raises InputError."""
        fix = "generation is not in this version; take a task of likelihoods"
        raise InputError("lm-eval request", "generate_until", fix)


class HarnessModel(RequestMaker):
    """The model for ``lm_eval.simple_evaluate(model=...)``. A collective: every rank calls it alike.

    lm-eval gives the results to the rank whose LOCAL_RANK is 0, and None to others. Call it within ``undisturbed``: it seeds
    all generators.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        score: Callable[[Sequence[Request]], list[Likelihood]],
    ):
        super().__init__(tokenizer, longest)
        self._score = score

    @classmethod
    def over(
        cls, engine: Engine, tokenizer: Path, row_tokens: int, stops: Callable[[], bool] = lambda: False
    ) -> "HarnessModel":
        """Of an engine and its tokenizer's folder; see ``score_requests`` for the rest and for what is raised."""
        longest = engine.shape.max_positions
        return cls(load_tokenizer(tokenizer), longest, lambda asked: score_requests(engine, asked, row_tokens, stops))

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text."""
        windows = super().loglikelihood_rolling(requests, disable_tqdm)
        answers = iter(self._score([window for own in windows for window in own]))
        return [response(own, [next(answers) for _ in own]) for own in windows]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs) -> list[tuple[float, bool]]:
        asked = super()._loglikelihood_tokens(requests)
        return [response(request, [answer]) for request, answer in zip(asked, self._score(asked), strict=True)]


def response(asked: Request | list[Request], answers: Sequence[Likelihood]):
    """lm-eval's form of the answers to what ``RequestMaker`` made of one instance."""
    if isinstance(asked, list):
        return sum(answer.logprob for answer in answers)
    return answers[0].logprob, answers[0].is_greedy


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """As ``HFLM`` loads it. Raises InputError when transformers cannot."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds
        fix = f"transformers cannot read it, and lm-eval needs that ({type(error).__name__}: {error})"
        raise InputError("tokenizer", str(folder), fix) from error


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds: a task that draws from the global generators draws what it draws there, on every rank. Nothing of it
    remains."""
    with undisturbed():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.default_generator.manual_seed(DEFAULT_OTHER_SEED)
        yield


def build_task(field: str, name: str, folder: Path | None, shots: int | None) -> Task:
    """A task with all of its instances.

    Args:
        field: of what the task is, for errors.
        folder: of task files; None: those that come with lm-eval.
        shots: examples that are shown; None: as the task has it.

    Raises InputError for one that is not known, cannot be read, or is answered by more than likelihoods.
    """
    with seeded(), contextlib.redirect_stderr(io.StringIO()):  # progress bars, on every rank
        try:
            manager = lm_eval.tasks.TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
            if name not in manager.all_subtasks:
                where = "comes with lm-eval" if folder is None else f"is in {folder}"
                raise InputError(f"{field} task", name, f"no such task {where} (of a group, name its tasks)")
            (task,) = manager.load([name])["tasks"].values()
            _check(field, name, task, shots)
            _set_shots(task, shots)
            task.build_all_requests()
        except InputError:
            raise
        except Exception as error:  # whatever lm-eval, datasets and the task's own code raise
            fix = f"lm-eval cannot read it ({type(error).__name__}: {error})"
            raise InputError(f"{field} task", name, fix) from error
    return task


def _check(field: str, name: str, task: Task, shots: int | None) -> None:
    if task.OUTPUT_TYPE == "generate_until":
        raise InputError(f"{field} task", name, "generation is not in this version; take a task of likelihoods")
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"{field} task", name, "a task must be of texts, and run no code that a model writes; take another"
        )
    if shots and task.get_config("num_fewshot") == 0:
        raise InputError(
            f"{field} shots", shots, f"the task {name} itself says 0, and lm-eval keeps to that; leave it out"
        )


def _set_shots(task: Task, shots: int | None) -> None:
    if shots is not None or task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
