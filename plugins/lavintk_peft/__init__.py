"""Methods of the PEFT library on frozen layers of any storage, saved in PEFT's own format.

Choose it for a method that lavintk has not itself: DoRA, OFT, IA3, VeRA, LoHa, LoKr and others. For LoRA and rsLoRA
take ``lora``, which is faster. PEFT computes its adapters in fp32. Needs ``pip install peft``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lavintk import hookimpl
from lavintk.errors import did_you_mean
from lavintk.targets import HELP
from lavintk_peft.methods import METHODS, PLAIN_STARTS, Method

if TYPE_CHECKING:
    from lavintk.contracts import Adapter
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class PeftOptions:
    """Method, place and size of the change; the rest by PEFT's own names."""

    method: str = field(default="dora", metadata={"help": ", ".join(METHODS)})
    r: int | None = field(default=None, metadata={"help": "rank, where the method has one; null for PEFT's default"})
    targets: str = field(default="all", metadata={"help": HELP})
    settings: dict[str, Any] | str = field(
        default="",
        metadata={
            "help": "further fields of PEFT's configuration: a mapping, or NAME:VALUE separated by + as in "
            "lora_alpha:32+lora_dropout:0.1; of dora: " + ", ".join(METHODS["dora"].settings)
        },
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"no method {self.method!r}; known: {known}.{did_you_mean(self.method, METHODS)}")
        if self.r is not None and not self.chosen.ranked:
            raise ValueError(f"method {self.method!r} has no rank: leave r out")
        if self.r is not None and self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        given, known = self.given(), ", ".join(self.chosen.settings)
        unknown = [name for name in given if name not in self.chosen.settings]
        if unknown:
            hint = did_you_mean(unknown[0], self.chosen.settings)
            raise ValueError(f"settings of {self.method!r}: unknown {', '.join(unknown)}; known: {known}.{hint}")
        if given.get("init_lora_weights", True) not in PLAIN_STARTS:
            raise ValueError(
                f"init_lora_weights={given['init_lora_weights']!r} would change the base or the first outputs; "
                f"known: {', '.join(map(str, PLAIN_STARTS))}"
            )

    @property
    def chosen(self) -> Method:
        """What ``method`` names."""
        return METHODS[self.method]

    def given(self) -> Mapping[str, Any]:
        """Return ``settings`` by name, values of text read as YAML.

        :raises ValueError: a part without a name or a value.
        """
        import yaml

        if not isinstance(self.settings, str):
            return self.settings
        found: dict[str, Any] = {}
        for part in filter(None, self.settings.split("+")):
            name, colon, value = part.partition(":")
            if not (colon and name.strip().isidentifier() and value.strip()):
                raise ValueError(f"settings: expected NAME:VALUE, got {part!r}")
            try:
                found[name.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"settings: {value!r} of {name!r} cannot be read") from error
        return found


def make_peft(options: PeftOptions) -> Adapter:
    """Return an adapter that is not attached yet.

    :raises OptionsError: PEFT refuses the settings.
    """
    from lavintk_peft.adapter import PeftAdapter

    return PeftAdapter(options)


@hookimpl
def lavintk_register_adapters(registry: Registry[Adapter]) -> None:
    """Offer ``peft``."""
    registry.add("peft", make_peft, options=PeftOptions, summary="DoRA, OFT, IA3, VeRA, LoHa and more, by PEFT")
