"""What :func:`lavintk.testing.check_optimizer` asks."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavintk.contracts import Optimizer
from lavintk.errors import LavintkError
from lavintk.flat import flatten
from lavintk.testing.outcome import Report
from lavintk.testing.promises import Promises, class_name, relative_error

BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = ((96, 80), (7,), (64, 64), (3, 5))
"""Two parameters large enough for 8-bit state (4096 elements) in whole blocks of 256, and two small ones."""
STEPS, NEAR = 200, 0.1
"""Steps on the quadratic, and how near its optimum they must end, relative to where they began."""
WORDS, WIDTH, LENGTH, TRAINED = 64, 32, 256, 80
"""Vocabulary, width, tokens and steps of the language model."""
LEARNT = 0.5
"""The part of its first loss that the language model may have left."""


def check(make: Callable[[], Optimizer], lr: float, language_lr: float) -> Report:
    """See :func:`lavintk.testing.check_optimizer`."""
    optimizer = make()
    promises = Promises(class_name(optimizer))
    _declarations(promises, optimizer)
    devices = ["cuda"] if torch.cuda.is_available() else []
    if not devices:
        promises.skip("Optimizer on CUDA", f"torch {torch.__version__} sees no CUDA device")
    text = "works on a CPU, or refuses it with a LavintkError and says so in without_cuda"
    with promises.keep("Optimizer.without_cuda", text) as promise:
        try:
            _build(optimizer, _parameters("cpu"), lr)
        except LavintkError as error:
            promise.require(bool(optimizer.without_cuda), f"it is empty, and build() raised: {error}")
            promises.skip("Optimizer on a CPU", f"build() refuses it: {error}")
        else:
            devices.insert(0, "cpu")
    for device in devices:
        _Questions(promises, make, device, lr).ask(language_lr)
    return promises.report()


def _declarations(promises: Promises, optimizer: Optimizer) -> None:
    text = "are True or False, a number of bits, a sentence or nothing, and True, False or absent"
    with promises.keep("Optimizer.paged, state_bits, without_cuda, elementwise", text) as promise:
        promise.require(isinstance(optimizer.paged, bool), f"paged is {optimizer.paged!r}")
        bits = optimizer.state_bits
        promise.require(isinstance(bits, int) and 0 <= bits <= 64, f"state_bits is {bits!r}")
        promise.require(isinstance(optimizer.without_cuda, str), f"without_cuda is {optimizer.without_cuda!r}")
        elementwise = getattr(optimizer, "elementwise", False)
        promise.require(isinstance(elementwise, bool), f"elementwise is {elementwise!r}")
    with promises.keep("Optimizer.without_cuda", "says what differs on a machine without CUDA") as promise:
        told = bool(optimizer.without_cuda) or not optimizer.paged
        promise.require(told, "it is empty, but the state is paged, and without CUDA nothing is")


class _Questions:
    """What is asked of an optimizer on one device."""

    def __init__(self, promises: Promises, make: Callable[[], Optimizer], device: str, lr: float) -> None:
        self.promises, self.make, self.device, self.lr = promises, make, device, lr

    def ask(self, language_lr: float) -> None:
        self._groups()
        self._zero_rate()
        self._quadratic()
        self._language_model(language_lr)
        self._resumes()
        self._memory()
        self._flat()

    def _groups(self) -> None:
        text = "returns a torch optimizer over all groups, each with its own weight_decay and lr as the peak rate"
        with self.promises.keep("Optimizer.build", text) as promise:
            parameters = _parameters(self.device)
            optimizer = _build(self.make(), parameters, self.lr, decay=0.5)
            promise.require(isinstance(optimizer, torch.optim.Optimizer), f"it is a {class_name(optimizer)}")
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            missing = sum(id(p) not in held for p in parameters)
            promise.require(not missing, f"{missing} of {len(parameters)} parameters are in no group")
            rates = {group["lr"] for group in optimizer.param_groups}
            promise.require(rates == {self.lr}, f"learning rates of the groups are {sorted(rates)}, asked {self.lr}")
            before = [p.detach().clone() for p in parameters]
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
            for place, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
                size, new = float(old.norm()), float(parameter.detach().norm())
                shape = list(parameter.shape)
                if place % 2:
                    found = f"a parameter {shape} with weight_decay 0 and no gradient moved by {abs(new - size):.2g}"
                    promise.require(torch.equal(parameter.detach(), old), found)
                else:
                    found = f"a parameter {shape} with weight_decay 0.5 and no gradient went from norm {size:.4g} to"
                    promise.require(new < size, f"{found} {new:.4g}")

    def _zero_rate(self) -> None:
        text = "takes the learning rate that the schedule sets in its groups"
        with self.promises.keep("Optimizer.build", text) as promise:
            parameters = _parameters(self.device)
            optimizer = _build(self.make(), parameters, self.lr)
            _descend(optimizer, parameters, 2)
            before = [p.detach().clone() for p in parameters]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            _descend(optimizer, parameters, 1, start=2)
            moved = max(float((p.detach() - old).abs().max()) for p, old in zip(parameters, before))
            promise.require(moved == 0, f"a step with lr set to 0 moves parameters by up to {moved:.2g}")

    def _quadratic(self) -> None:
        text = f"converges on a quadratic: {STEPS} steps from lr {self.lr:g} down to 0"
        with self.promises.keep("Optimizer.build", text) as promise:
            targets = [p.detach() for p in _parameters(self.device)]
            parameters = [nn.Parameter(torch.zeros_like(target)) for target in targets]
            optimizer = _build(self.make(), parameters, self.lr)
            for step in range(STEPS):
                _set_rate(optimizer, self.lr * (1 - step / STEPS))
                for parameter, target in zip(parameters, targets):
                    parameter.grad = parameter.detach() - target
                optimizer.step()
            for parameter, target in zip(parameters, targets):
                left = relative_error(parameter, target)
                promise.require(
                    left <= NEAR,
                    f"a parameter {list(target.shape)} is left with {left:.2g} of its distance, at most {NEAR:g} is "
                    "allowed; does it want another lr?",
                )

    def _language_model(self, rate: float) -> None:
        text = f"trains a tiny language model: {TRAINED} steps from lr {rate:g} down to 0"
        with self.promises.keep("Optimizer.build", text) as promise:
            model, words = _language_model(self.device)
            optimizer = _build(self.make(), list(model.parameters()), rate)
            losses = []
            for step in range(TRAINED):
                _set_rate(optimizer, rate * (1 - step / TRAINED))
                optimizer.zero_grad()
                loss = _loss(model, words)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            promise.require(
                losses[-1] <= LEARNT * losses[0],
                f"its loss went from {losses[0]:.3f} to {losses[-1]:.3f}, at most {LEARNT * losses[0]:.3f} is allowed; "
                "does it want another language_lr?",
            )

    def _resumes(self) -> None:
        text = "goes on identically from a state_dict that was saved and loaded"
        with self.promises.keep("Optimizer.build", text) as promise:
            parameters = _parameters(self.device)
            optimizer = _build(self.make(), parameters, self.lr)
            _descend(optimizer, parameters, 5)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            others = [nn.Parameter(p.detach().clone()) for p in parameters]
            resumed = _build(self.make(), others, self.lr)
            resumed.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            for count, start in ((1, 5), (4, 6)):
                _descend(optimizer, parameters, count, start)
                _descend(resumed, others, count, start)
                for one, other in zip(parameters, others):
                    differ, most = _difference(one, other)
                    promise.require(
                        differ == 0,
                        f"{start + count - 5} steps on, {differ} of {one.numel()} elements of a parameter "
                        f"{list(one.shape)} differ by up to {most:.2g}",
                    )

    def _memory(self) -> None:
        declared = self.make().state_bits
        text = f"says how many bits a state value takes: {declared}"
        with self.promises.keep("Optimizer.state_bits", text) as promise:
            parameters = _parameters(self.device)
            optimizer = _build(self.make(), parameters, self.lr)
            _descend(optimizer, parameters, 2)
            most = 0.0
            for value in _tensors(optimizer.state[parameters[0]]):
                bits, share = 8 * value.element_size(), value.numel() / parameters[0].numel()
                most = max(most, bits * min(1.0, share) if share > 0.1 else 0.0)  # scales of blocks count for little
            promise.require(most <= declared, f"a parameter of {parameters[0].numel()} elements has {most:g}")

    def _flat(self) -> None:
        if not getattr(self.make(), "elementwise", False):
            self.promises.skip("Optimizer.elementwise", "it says no, so it is not given flat parameters")
            return
        text = "takes the same steps on flat parameters as on the parameters themselves"
        with self.promises.keep("Optimizer.elementwise", text) as promise:
            alone, joined = _parameters(self.device), _parameters(self.device)
            separate = self.make().build(_groups(alone, 0.1), lr=self.lr, betas=BETAS, eps=EPS)
            together = self.make().build(flatten(_groups(joined, 0.1)), lr=self.lr, betas=BETAS, eps=EPS)
            for step in range(5):
                for optimizer, parameters in ((separate, alone), (together, joined)):
                    optimizer.zero_grad(set_to_none=False)
                    _quadratic(parameters, step).backward()
                    optimizer.step()
            for one, other in zip(alone, joined):
                differ, most = _difference(one, other)
                allowed = 1e-5 * float(one.detach().abs().max()) + 1e-6
                promise.require(
                    most <= allowed,
                    f"a parameter {list(one.shape)} differs by up to {most:.2g} after 5 steps ({differ} elements), "
                    f"at most {allowed:.2g} is allowed; declare elementwise = False",
                )


def _parameters(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(*shape, generator=generator).to(device)) for shape in SHAPES]


def _groups(parameters: Sequence[nn.Parameter], decay: float) -> list[dict[str, object]]:
    """Return every other parameter with a weight decay, the rest without."""
    groups = [
        {"params": list(parameters[::2]), "weight_decay": decay},
        {"params": list(parameters[1::2]), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _build(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], lr: float, decay: float = 0.0
) -> torch.optim.Optimizer:
    return optimizer.build(_groups(parameters, decay), lr=lr, betas=BETAS, eps=EPS)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _quadratic(parameters: Sequence[nn.Parameter], step: int) -> Tensor:
    """Return half the squared distance from a point that moves a little with each step."""
    generator = torch.Generator().manual_seed(step)
    targets = [0.1 * torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
    return torch.stack([((p - target) ** 2).sum() / 2 for p, target in zip(parameters, targets)]).sum()


def _descend(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], count: int, start: int = 0) -> None:
    """Take steps whose gradients follow from parameters and step number alone."""
    for step in range(start, start + count):
        optimizer.zero_grad()
        _quadratic(parameters, step).backward()
        optimizer.step()


def _language_model(device: str) -> tuple[nn.Module, Tensor]:
    """Return a model that guesses a word from the two before it, and a text."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, WORDS, (LENGTH,), generator=generator).to(device)
    model = nn.Sequential(
        nn.Embedding(WORDS, WIDTH), nn.Flatten(), nn.Linear(2 * WIDTH, 96), nn.SiLU(), nn.Linear(96, WORDS)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.shape[0] == WORDS and parameter.shape[-1] == WIDTH else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.to(device), words


def _loss(model: nn.Module, words: Tensor) -> Tensor:
    return F.cross_entropy(model(torch.stack([words[:-2], words[1:-1]], dim=1)), words[2:])


def _difference(one: Tensor, other: Tensor) -> tuple[int, float]:
    """Return how many elements differ, and by how much at most."""
    difference = (one.detach() - other.detach()).abs()
    return int((difference != 0).sum()), float(difference.max())


def _tensors(state: object) -> list[Tensor]:
    """Return the tensors of a parameter's state; of those that wrap others, what they wrap."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _tensors(value)]
    if not isinstance(state, Tensor):
        return []
    inner = getattr(state, "__tensor_flatten__", None)
    if inner is None:
        return [state]
    return [tensor for name in inner()[0] for tensor in _tensors(getattr(state, name))]
