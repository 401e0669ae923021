"""YAML files and ``section.key=value`` words become a ``Config``, or one line that says what is wrong.

A file may start from another with ``extends: FILE`` (relative to itself), so that a configuration states only what it
changes. Paths in values are relative to the current folder and are stored absolute.
"""

import difflib
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cpt_mega.config.schema import Config
from cpt_mega.errors import InputError

# Keys whose values are paths; every other value is left as written.
_PATHS = ("run.dir", "model.checkpoint", "tokenizer.path", "gates.suite")
_PATH_LISTS = ("data.sources", "eval.sets")
_DEEPEST = 32  # of values within values: no option comes near
_MOST_VALUES = 1_000_000  # in a file, each alias counted as all that it stands for


_YAML_KEY = re.compile(r"(?P<indent> *)(?P<item>- )?(?P<name>\w+):( |$)")

Options = TypeVar("Options", bound=BaseModel)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a configuration file and applies overrides of the form ``section.key=value`` (values are YAML).

    Raises InputError (field, value, fix) for a missing file, YAML that does not parse, an unknown key, a wrong type or
    range, or a combination that cannot be.
    """
    return build_config(_read(Path(path), ()), overrides)


def build_config(values: dict, overrides: Iterable[str] = ()) -> Config:
    """Like ``load_config``, from plain values instead of a file."""
    for word in overrides:
        _override(values, word)
    _absolute_paths(values)
    config = _validated(values, Config)
    _check_accepted(config.restore.accept)
    return config


def load_sections(
    path: str | Path,
    model: type[Options],
    what: str,
    locate: Callable[[dict, Path], None] = lambda values, folder: None,
) -> Options:
    """Reads another file of options, such as a suite of gates, under the same rules.

    Args:
        what: the field that errors name.
        locate: makes paths in the values of one file absolute, given its folder: a file that extends it may lie elsewhere.
    """
    return _validated(_read(Path(path), (), what, locate), model)


def resolved_yaml(config: Config) -> str:
    """The whole configuration with its defaults, as YAML that ``load_config`` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def explained_yaml(config: Config) -> str:
    """The same, with what each option means behind its first line."""
    help_of, said, lines = {name: words for name, _, _, words in describe_options()}, set(), []
    place: list[tuple[int, str]] = []  # keys above a line, and how far they are indented
    for line in resolved_yaml(config).splitlines():
        key = _YAML_KEY.match(line)
        if key is None:
            lines.append(line)
            continue
        indent, is_item = len(key["indent"]), bool(key["item"])
        place = [(column, name) for column, name in place if column < indent + 2 * is_item]
        if is_item:
            place = [(column, f"{name}[]" if column == place[-1][0] else name) for column, name in place]
        place.append((indent + 2 * is_item, key["name"]))
        name = ".".join(part for _, part in place)
        words = "" if name in said else help_of.get(name, "")
        said.add(name)
        lines.append(f"{line:<40}  # {words}" if words else line)
    return "\n".join(lines) + "\n"


def describe_options() -> Iterator[tuple[str, str, Any, str]]:
    """Every option as (dotted name, type, default or "required", help), for tables and for tests."""
    yield from _describe(Config, "")


def differing_fields(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) for every leaf of two resolved configurations that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differing_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def _read(
    path: Path,
    seen: tuple[Path, ...],
    what: str = "--config",
    locate: Callable[[dict, Path], None] = lambda values, folder: None,
) -> dict:
    if path.resolve() in seen:
        raise InputError("extends", str(path), "files extend each other in a circle; drop one 'extends'")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader) or {}
    except OSError as error:
        raise InputError(what, str(path), f"cannot be read ({error.strerror}); name an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())[:200]
        raise InputError(what, str(path), f"is not valid YAML: {where}") from error
    if not isinstance(values, dict):
        raise InputError(what, str(path), "must be a mapping of its keys, as 'train:' and 'data:' in a configuration")
    locate(values, path.parent)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return _merged(_read(path.parent / _path("extends", str(parent)), (*seen, path.resolve()), what, locate), values)


class _YamlLoader(yaml.SafeLoader):
    """YAML with three habits of this field: 2e-5 and 1e9 are numbers, off and on are words (as in YAML 1.2), and a key given
    twice is an error.

    Aliases are followed as far as that takes no more memory than a file of some size would: a few lines of them can stand for
    billions of values. Whatever is wrong is a YAMLError.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._depth, self._sizes = 0, {}  # values below each finished node, itself included, by identity

    def compose_node(self, parent, index):
        """Counts what a node stands for."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._size(inner) for inner in _inner_nodes(node))
        return node

    def _size(self, node: yaml.Node) -> int:
        if id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands within its own value", node.start_mark)
        if self._sizes[id(node)] > _MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, "aliases stand for too many values", node.start_mark)
        return self._sizes[id(node)]

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            # PyYAML's own constructors let these through: a date in month 13, "!!int x", "!!bool x"
            raise yaml.constructor.ConstructorError(None, None, f"is no {node.tag}", node.start_mark) from error

    def construct_mapping(self, node, deep=False):
        """No key twice."""
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if isinstance(key, list | dict | set):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _inner_nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace("_", ""))


# YAML 1.1 reads 2e-5 as a string because it has no dot.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_BOOLEAN = "tag:yaml.org,2002:bool"
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _BOOLEAN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_YamlLoader.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))
_YamlLoader.add_constructor("!exponent", _number)


def _merged(base: dict, change: dict) -> dict:
    """``change`` over ``base``; mappings merge key by key, everything else is replaced."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _override(values: dict, word: str) -> None:
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise InputError("command line", word, "overrides are written section.key=value")
    try:
        value = yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        raise InputError(name, text, "the value is not valid YAML; quote it") from error
    place: Any = values
    *sections, last = name.split(".")
    for section in sections:
        place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise InputError(name, text, f"'{section}' is not a section; overrides are written section.key=value")
    place[last] = value


def _absolute_paths(values: dict) -> None:
    for name in _PATHS:
        section, key = name.split(".")
        place = values.get(section)
        if isinstance(place, dict) and isinstance(place.get(key), str):
            place[key] = _absolute(name, place[key])
    for name in _PATH_LISTS:
        section, key = name.split(".")
        entries = values.get(section, {}).get(key) if isinstance(values.get(section), dict) else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                entry["path"] = _absolute(f"{name} path", entry["path"])


def _absolute(field: str, text: str) -> str:
    try:
        return str(_path(field, text).expanduser().absolute())
    except RuntimeError as error:
        raise InputError(field, text, f"{error}; write the path out".lower()) from error


def _path(field: str, text: str) -> Path:
    """Raises InputError for what no file can be called."""
    try:
        if b"\0" not in os.fsencode(text):
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise InputError(field, text, "no file can have such a name; mend the path")


def _validated(values: dict, model: type[Options]) -> Options:
    try:
        return model.model_validate(_whole_numbers(_tuples(values)))
    except ValidationError as error:
        raise _as_input_error(_most_telling(error.errors()), model) from None


def _check_accepted(names: Iterable[str]) -> None:
    """Raises InputError for an accepted name that is neither an option nor a section: it would accept nothing."""
    known = {name.partition("[]")[0] for name, *_ in describe_options()}
    for name in names:
        if not any(f"{k}.".startswith(f"{name}.") or name.startswith(f"{k}.") for k in known):
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"; did you mean {close[0]!r}?" if close else "; name one as train.tokens, or a section"
            raise InputError("restore.accept", name, f"no such option{fix}")


def _tuples(value: Any) -> Any:
    """Lists as tuples: the frozen options hold tuples, and strict validation takes nothing else."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _whole_numbers(value: Any) -> Any:
    """1e9 tokens is a float to YAML; a float without a fraction passes for an integer (and back, in pydantic)."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_whole_numbers(item) for item in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


# what pydantic says in Python's words
_IN_WORDS = {
    "tuple_type": "must be a list, as [a, b]",
    "dict_type": "must be a mapping, as {name: value}",
    "model_type": "must be a section: a mapping of its keys",
    "bool_type": "must be true or false",
}


def _most_telling(problems: list[dict]) -> dict:
    """The first one; but where something is missing a name may be misspelt beside it."""
    first = problems[0]
    beside = (p for p in problems if p["type"] == "extra_forbidden" and p["loc"][:-1] == first["loc"][:-1])
    return next(beside, first) if first["type"] == "missing" else first


def _as_input_error(problem: dict, model: type[BaseModel]) -> InputError:
    """pydantic's first complaint as field, value and fix."""
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return InputError(field or "key", problem["input"], "unknown key" + _suggestion(problem["loc"], model))
    if problem["type"] == "missing":
        where = " in the configuration file or as an override" if model is Config else ""
        return InputError(field, None, f"is required; set it{where}")
    if problem["type"] == "value_error" and not field:
        field, _, sentence = str(problem["ctx"]["error"]).partition(": ")
        return InputError(field, _given_or_default(field, problem["input"], model), sentence)
    fix = _IN_WORDS.get(problem["type"], problem["msg"][0].lower() + problem["msg"][1:])
    return InputError(field or "key", problem["input"], fix)  # a name that is no text has no place


def _given_or_default(field: str, given: Any, model: type[BaseModel]) -> Any:
    value = given
    for part in field.split("."):
        option = model.model_fields[part]
        value = value[part] if isinstance(value, dict) and part in value else option.get_default()
        model = _section_of(option.annotation)
    return value


def _suggestion(location: tuple, model: type[BaseModel]) -> str:
    sections = [model]
    for part in location[:-1]:
        if isinstance(part, str):
            sections = _inner_sections(sections, part)
    names = list(sections[0].model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(names)}"


def _inner_sections(sections: list[type[BaseModel]], part: str) -> list[type[BaseModel]]:
    """What may stand under a key; or, where sections of several kinds may stand in a list, that of the kind ``part``."""
    fields = [section.model_fields[part] for section in sections if part in section.model_fields]
    if fields:
        return [inner for field in fields for inner in _sections_of(field.annotation)]
    of_kind = [s for s in sections if "kind" in s.model_fields and part in get_args(s.model_fields["kind"].annotation)]
    return of_kind or sections  # a name that the user gave


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The option class inside an annotation such as ``tuple[SourceOptions, ...]``."""
    return next(iter(_sections_of(annotation)), None)


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """All of them."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [inner for part in get_args(annotation) for inner in _sections_of(part)]


def _describe(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _describe(inner, f"{prefix}{name}{'[]' if get_origin(field.annotation) else ''}.")
        else:
            default = "required" if field.is_required() else field.default
            kind = getattr(field.annotation, "__name__", None) if not get_args(field.annotation) else None
            yield (
                f"{prefix}{name}",
                kind or str(field.annotation).replace("typing.", ""),
                default,
                field.description or "",
            )
