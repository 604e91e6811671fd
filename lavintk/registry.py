"""Names to factories: what plugins offer, who offers it, and which options it takes.

An entry declares its options as a plain dataclass. ``nf4:double_quant=false`` on the command line or
``{name: nf4, double_quant: false}`` in a recipe are checked against it before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from lavintk.errors import LavintkError, OptionsError, PluginError, UnknownNameError, did_you_mean

Product = TypeVar("Product")


@dataclass(frozen=True)
class NoOptions:
    """The options of an entry that has none."""


@dataclass(frozen=True)
class Choice:
    """A name and its options as the user wrote them, for example ``nf4:double_quant=false``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read ``NAME[:key=value,...]``; a part that starts with no ``key=`` is the option ``path``.

        :raises OptionsError: an option is given twice.
        """
        name, _, rest = text.partition(":")
        options: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            named = equals and key.strip().isidentifier()  # which s3/run=1/train.json is not
            key, value = (key.strip(), value.strip()) if named else ("path", part)
            if key in options:
                raise OptionsError(repr(text), [f"option {key!r} is given twice"])
            options[key] = value
        return cls(name.strip(), options)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True)
class Option:
    """One declared option of an entry, as ``lavintk plugins show`` prints it."""

    name: str
    type: str
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class Entry(Generic[Product]):
    """One thing that a plugin offers under a name."""

    kind: str
    name: str
    factory: Callable[[Any], Product]
    owner: str
    options: type
    summary: str

    def declared_options(self) -> list[Option]:
        """Return the options with types as text and the help of ``field(metadata={"help": ...})``."""
        hints = get_type_hints(self.options)
        return [_describe_option(f, hints[f.name]) for f in dataclasses.fields(self.options)]

    def parse_options(self, given: Mapping[str, Any]) -> Any:
        """Return the options dataclass filled from ``given``; strings are converted to the declared types.

        :raises OptionsError: unknown names, missing or unfitting values, all of them together.
        """
        from pydantic import ValidationError  # slow to import; --help does without

        known = [f.name for f in dataclasses.fields(self.options)]
        faults = [
            f"unknown option {name!r}; known: {', '.join(known) or 'none'}.{did_you_mean(name, known)}"
            for name in given
            if name not in known
        ]
        values: dict[str, Any] = {}
        hints = get_type_hints(self.options)
        for declared in dataclasses.fields(self.options):
            if declared.name not in given:
                if _required(declared):
                    faults.append(f"option {declared.name!r} is required")
                continue
            try:
                values[declared.name] = _convert(given[declared.name], hints[declared.name])
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                faults.append(f"option {declared.name!r}: {reason}, got {given[declared.name]!r}")
        if not faults:
            try:
                return self.options(**values)
            except ValueError as error:  # raised by the dataclass's own __post_init__
                faults.append(str(error))
        raise OptionsError(f"{self.kind} {self.name!r} (plugin {self.owner})", faults)

    def create(self, given: Mapping[str, Any] | None = None) -> Product:
        """Check the options and call the factory with them.

        :raises OptionsError: see :meth:`parse_options`.
        :raises PluginError: the factory needs a package that is not installed, or fails.
        """
        options = self.parse_options(given or {})
        try:
            return self.factory(options)
        except ImportError as error:
            raise PluginError(
                f"{self.kind} {self.name!r} (plugin {self.owner}) cannot be used: {error}. "
                f"Install what is missing, or skip the plugin with LAVINTK_DISABLE={self.owner}."
            ) from error
        except LavintkError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {self.owner!r} failed to make {self.kind} {self.name!r}: {type(error).__name__}: {error}\n"
                f"skip it with LAVINTK_DISABLE={self.owner}"
            ) from error


class Registry(Generic[Product]):
    """The entries of one kind, keyed by name. Two owners of one name are an error naming both."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[Product]] = {}
        self._owner = "unknown"

    def owned_by(self, owner: str) -> Registry[Product]:
        """Return a view of this registry whose additions belong to the plugin ``owner``."""
        view: Registry[Product] = Registry(self.kind)
        view._entries, view._owner = self._entries, owner
        return view

    def add(
        self,
        name: str,
        factory: Callable[[Any], Product],
        *,
        options: type = NoOptions,
        summary: str = "",
    ) -> None:
        """Offer ``factory`` under ``name``.

        :param factory: called with an instance of ``options``; heavy imports belong inside it.
        :param options: a dataclass; ``field(metadata={"help": ...})`` documents an option.
        :param summary: one line for ``lavintk plugins show``.
        :raises PluginError: the name is taken, or ``options`` is no dataclass.
        """
        if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
            raise PluginError(f"plugin {self._owner!r}: options of {self.kind} {name!r} must be a dataclass")
        if name in self._entries:
            other = self._entries[name].owner
            raise PluginError(
                f"{self.kind} {name!r} is offered by plugin {other!r} and by plugin {self._owner!r}: "
                f"disable one of them with LAVINTK_DISABLE={self._owner}"
            )
        self._entries[name] = Entry(self.kind, name, factory, self._owner, options, summary)

    def __getitem__(self, name: str) -> Entry[Product]:
        """Return the entry; an unknown name raises :class:`UnknownNameError` with a suggestion."""
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self.names(), [self._entries[n].owner for n in self.names()])
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[Product]]:
        return (self._entries[name] for name in self.names())

    def names(self) -> list[str]:
        """Return the names in alphabetical order."""
        return sorted(self._entries)

    def create(self, choice: Choice) -> Product:
        """Create what ``choice`` names, with its options."""
        return self[choice.name].create(choice.options)


def _convert(value: Any, wanted: Any) -> Any:
    """Return ``value`` as the type ``wanted``; text that does not fit is read as YAML: ``null``, ``8``.

    :raises pydantic.ValidationError: it fits neither way.
    """
    import yaml
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter: TypeAdapter[Any] = TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if not isinstance(value, str):
            raise
        try:
            return adapter.validate_python(yaml.safe_load(value))
        except (ValidationError, yaml.YAMLError):
            pass
        raise


def _required(declared: dataclasses.Field[Any]) -> bool:
    return declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING


def _describe_option(declared: dataclasses.Field[Any], hint: Any) -> Option:
    default = None if declared.default is dataclasses.MISSING else declared.default
    if declared.default_factory is not dataclasses.MISSING:
        default = declared.default_factory()
    type_name = (
        declared.type if isinstance(declared.type, str) else getattr(declared.type, "__name__", str(declared.type))
    )
    if get_origin(hint) is Literal:
        type_name = f"one of {', '.join(map(str, get_args(hint)))}"
    return Option(declared.name, type_name, default, _required(declared), declared.metadata.get("help", ""))
