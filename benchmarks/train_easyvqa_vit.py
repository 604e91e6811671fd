"""Train the small vision tower of the easy-VQA demo.

LaVIN reads an image through the class tokens that a CLIP vision tower leaves in its residual stream
after several of its layers. A demo that runs on two processor cores needs a tower that does the same at a
tiny fraction of the size, so this script trains a `CLIPVisionModel` of 64 x 64 pixels on the
training images of easy-VQA (the `easy_vqa` package) and on nothing else:

1. read each image's colour and shape off the answers to its training questions;
2. train the tower the CLIP way, against learned embeddings of the 24 captions "a <colour> <shape>", with
   this supervision applied to the class token after each of the last layers, not after the last one only;
3. save the tower in half precision, reload it, and fit linear probes on the reloaded tower's class tokens.

The caption embeddings and the other heads are thrown away. Run it from the repository root with

    python benchmarks/train_easyvqa_vit.py --out lavintk/assets/vit-easyvqa

It takes about seven minutes on two cores that have nothing else to do. The test images serve the final table
only.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import easy_vqa
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModel

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
UNKNOWN = -1  # the target of an image whose questions do not tell

IMAGE_SIZE = 64
PIXEL_MEAN = 0.5
PIXEL_DEVIATION = 0.5
SUPERVISED_LAYERS = 3
CAPTION_DIMENSIONS = 64

BATCH_SIZE = 64
PROBE_BATCH_SIZE = 250
PEAK_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP_SHARE = 0.1
GRADIENT_NORM_LIMIT = 1.0
LARGEST_BRIGHTNESS_SHIFT = 8  # of 255; the closest two colours, red and brown, are 90 apart in their red channel

Split = Literal["train", "test"]


def main() -> None:
    """Train, save, reload and probe the tower."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    setting = describe_setting()
    print(setting)

    training_set = load_split("train")
    print(f"training set: {training_set.describe()}")
    tower = CLIPVisionModel(tower_configuration())
    parameter_count = sum(parameter.numel() for parameter in tower.parameters())
    print(f"tower: {parameter_count:,} parameters")

    start = time.perf_counter()
    train(tower, training_set, arguments.epochs)
    training_seconds = time.perf_counter() - start
    print(f"trained for {arguments.epochs} epochs in {training_seconds:.0f} s")

    save_tower(tower, arguments.out)
    table = probe_table(arguments.out, training_set, load_split("test"))
    print(table)
    run_length = f"{training_seconds:.0f} seconds for {arguments.epochs} epochs from seed {arguments.seed}"
    description = readme(training_set.describe(), parameter_count, f"{run_length} on\n{setting}", table)
    (arguments.out / "README.md").write_text(description)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the small vision tower of the easy-VQA demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tower to")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def describe_setting() -> str:
    """Name the hardware and software that the figures were measured with."""
    return (
        f"{torch.get_num_threads()} threads of an {platform.machine()} CPU, no accelerator, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


# --- data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImages:
    """The images of a split, with the colour and the shape that its questions tell."""

    pixels: Tensor  # uint8, (images, 3, height, width)
    colours: Tensor  # indices into COLOURS, or UNKNOWN
    shapes: Tensor  # indices into SHAPES, or UNKNOWN

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pixels)

    def describe(self) -> str:
        """Say how many targets the questions gave."""
        known_colours = int((self.colours != UNKNOWN).sum())
        known_shapes = int((self.shapes != UNKNOWN).sum())
        return f"{len(self)} images, {known_colours} with a known colour, {known_shapes} with a known shape"


def load_split(split: Split) -> LabelledImages:
    """Load the images and targets of one split of easy-VQA, in the order of the image numbers."""
    if split == "train":
        paths, questions = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    else:
        paths, questions = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    colours, shapes = targets_from_questions(*questions)
    image_ids = sorted(paths)
    return LabelledImages(
        pixels=torch.stack([read_pixels(paths[image_id]) for image_id in image_ids]),
        colours=torch.tensor([colours.get(image_id, UNKNOWN) for image_id in image_ids]),
        shapes=torch.tensor([shapes.get(image_id, UNKNOWN) for image_id in image_ids]),
    )


def read_pixels(path: str) -> Tensor:
    """Read an image as bytes, channels first."""
    with Image.open(path) as image:
        raw = bytearray(image.convert("RGB").tobytes())
        width, height = image.size
    return torch.frombuffer(raw, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1).contiguous()


def targets_from_questions(
    questions: list[str], answers: list[str], image_ids: list[int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Collect each image's colour and shape from what the answers say about it."""
    colours: dict[int, int] = {}
    shapes: dict[int, int] = {}
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        for word in words_that_hold(question, answer):
            if word in COLOURS:
                record_target(colours, image_id, COLOURS.index(word))
            elif word in SHAPES:
                record_target(shapes, image_id, SHAPES.index(word))
    return colours, shapes


def words_that_hold(question: str, answer: str) -> list[str]:
    """Return words that are true of the image: the answer itself, or those of a confirmed yes/no question."""
    if answer not in ("yes", "no"):
        return [answer]
    words = re.findall(r"[a-z]+", question.lower())
    is_negated = "no" in words or "not" in words
    is_present = (answer == "yes") != is_negated
    return words if is_present else []


def record_target(targets: dict[int, int], image_id: int, target: int) -> None:
    """Store a target, refusing two questions that contradict each other."""
    if targets.setdefault(image_id, target) != target:
        raise ValueError(f"the questions of image {image_id} contradict each other")


# --- augmentation -------------------------------------------------------------------------------------


def augment(pixels: Tensor) -> Tensor:
    """Move each shape to a random place, mirror half of the images and shift their brightness a little."""
    moved = move_shapes(pixels)
    is_mirrored = torch.rand(len(moved), 1, 1, 1) < 0.5
    mirrored = torch.where(is_mirrored, moved.flip(-1), moved)
    brightness_shift = (torch.rand(len(moved), 1, 1, 1) * 2 - 1) * LARGEST_BRIGHTNESS_SHIFT
    return (mirrored + brightness_shift).clamp(0, 255)


def move_shapes(pixels: Tensor) -> Tensor:
    """Roll each image so that its shape lands anywhere in the image, whole.

    The background is one flat colour, so what a roll wraps round is background, and no seam shows.
    """
    is_shape = shape_mask(pixels)
    row_offsets = random_offsets(is_shape.any(dim=2))
    column_offsets = random_offsets(is_shape.any(dim=1))
    positions = torch.arange(IMAGE_SIZE)
    rows = (positions[None, :] - row_offsets[:, None]) % IMAGE_SIZE
    columns = (positions[None, :] - column_offsets[:, None]) % IMAGE_SIZE
    images = torch.arange(len(pixels))[:, None, None]
    # Indices on both sides of the channel slice put the channels last.
    return pixels[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float()


def shape_mask(pixels: Tensor) -> Tensor:
    """Mark the pixels that differ from the background, which covers more than half of each image."""
    background = pixels.flatten(2).median(dim=2).values[:, :, None, None]
    return (pixels != background).any(dim=1)


def random_offsets(is_occupied: Tensor) -> Tensor:
    """Draw for each image an offset along one axis that keeps the occupied stretch inside the image."""
    first = is_occupied.int().argmax(dim=1)
    last = IMAGE_SIZE - 1 - is_occupied.flip(1).int().argmax(dim=1)
    room = IMAGE_SIZE - (last - first)
    new_first = (torch.rand(len(first)) * room).long()
    return new_first - first


def normalise(pixels: Tensor) -> Tensor:
    """Scale bytes to what the saved image processor makes of them."""
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_DEVIATION


# --- training -----------------------------------------------------------------------------------------


def tower_configuration() -> CLIPVisionConfig:
    """Describe a CLIP vision tower that is small enough to ship with the source."""
    return CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=CAPTION_DIMENSIONS,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )


class ClassTokenSupervision(nn.Module):
    """The losses that one class token is trained by."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.projection = nn.Linear(hidden_size, CAPTION_DIMENSIONS, bias=False)
        self.colour_head = nn.Linear(hidden_size, len(COLOURS))
        self.shape_head = nn.Linear(hidden_size, len(SHAPES))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, class_tokens: Tensor, captions: Tensor, colours: Tensor, shapes: Tensor) -> Tensor:
        """Add up the caption, colour and shape losses, each over the images whose target is known."""
        features = self.norm(class_tokens)
        image_embeddings = functional.normalize(self.projection(features), dim=-1)
        caption_logits = self.log_scale.exp() * image_embeddings @ functional.normalize(captions, dim=-1).T
        return (
            cross_entropy_of_known(caption_logits, caption_targets(colours, shapes))
            + cross_entropy_of_known(self.colour_head(features), colours)
            + cross_entropy_of_known(self.shape_head(features), shapes)
        )


def caption_targets(colours: Tensor, shapes: Tensor) -> Tensor:
    """Number the captions "a <colour> <shape>", leaving out images of which only one part is known."""
    is_known = (colours != UNKNOWN) & (shapes != UNKNOWN)
    return torch.where(is_known, colours * len(SHAPES) + shapes, UNKNOWN)


def cross_entropy_of_known(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the cross entropy over the images whose target is known."""
    return functional.cross_entropy(logits, targets, ignore_index=UNKNOWN)


class SupervisedTower(nn.Module):
    """A tower, a caption table, and supervision of the class token after each of the last layers."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower
        self.captions = nn.Parameter(torch.randn(len(COLOURS) * len(SHAPES), CAPTION_DIMENSIONS))
        self.supervisions = nn.ModuleList(
            ClassTokenSupervision(tower.config.hidden_size) for _ in range(SUPERVISED_LAYERS)
        )
        # The last layer goes through the tower's own final norm, so that its pooled output is trained too.
        self.supervisions[-1].norm = nn.Identity()

    def forward(self, images: Tensor, colours: Tensor, shapes: Tensor) -> Tensor:
        """Average the losses of the supervised layers."""
        output = self.tower(images, output_hidden_states=True)
        earlier = [states[:, 0] for states in output.hidden_states[-SUPERVISED_LAYERS:-1]]
        class_tokens = [*earlier, output.pooler_output]
        losses = [
            supervision(tokens, self.captions, colours, shapes)
            for supervision, tokens in zip(self.supervisions, class_tokens, strict=True)
        ]
        return torch.stack(losses).mean()


def train(tower: CLIPVisionModel, training_set: LabelledImages, epochs: int) -> None:
    """Train the tower in place."""
    model = SupervisedTower(tower).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = len(training_set) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr=PEAK_LEARNING_RATE,
        total_steps=epochs * steps_per_epoch,
        pct_start=WARM_UP_SHARE,
        cycle_momentum=False,
    )
    for epoch in range(epochs):
        order = torch.randperm(len(training_set))
        total_loss = 0.0
        for batch in order[: steps_per_epoch * BATCH_SIZE].view(-1, BATCH_SIZE):
            images = normalise(augment(training_set.pixels[batch]))
            loss = model(images, training_set.colours[batch], training_set.shapes[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_LIMIT)
            optimiser.step()
            schedule.step()
            total_loss += loss.item()
        print(f"epoch {epoch + 1:2d}/{epochs}: loss {total_loss / steps_per_epoch:.4f}", flush=True)


# --- saving and probing -------------------------------------------------------------------------------


def save_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """Write the tower in half precision, with an image processor that CLIP's code understands."""
    folder.mkdir(parents=True, exist_ok=True)
    tower.half().save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_DEVIATION] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def probe_table(folder: Path, training_set: LabelledImages, test_set: LabelledImages) -> str:
    """Fit linear probes on the reloaded tower and format their accuracies as a Markdown table."""
    training_tokens = class_tokens_by_layer(folder, training_set)
    test_tokens = class_tokens_by_layer(folder, test_set)
    lines = [
        "| class token | colour, train | colour, test | shape, train | shape, test |",
        "|---|---|---|---|---|",
    ]
    # State 0 is left out: no layer has yet carried anything from the image into its class token.
    for layer in range(1, len(training_tokens)):
        cells = []
        for name in ("colours", "shapes"):
            cells += probe_accuracies(
                (training_tokens[layer], getattr(training_set, name)),
                (test_tokens[layer], getattr(test_set, name)),
            )
        lines.append(" | ".join([f"| `hidden_states[{layer}]`", *(f"{cell:.2%}" for cell in cells)]) + " |")
    return "\n".join(lines)


@torch.no_grad()
def class_tokens_by_layer(folder: Path, images: LabelledImages) -> list[Tensor]:
    """Run the saved tower on a split, through the saved image processor, and keep its class tokens."""
    tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder)
    batches = []
    for start in range(0, len(images), PROBE_BATCH_SIZE):
        pixels = images.pixels[start : start + PROBE_BATCH_SIZE]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
        inputs = processor(images=pictures, return_tensors="pt")
        hidden_states = tower(**inputs, output_hidden_states=True).hidden_states
        batches.append([states[:, 0] for states in hidden_states])
    return [torch.cat(layer) for layer in zip(*batches, strict=True)]


def probe_accuracies(training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[float]:
    """Fit a linear classifier on the training images and score it on both splits."""
    tokens, targets = known_only(*training)
    mean, deviation = tokens.mean(dim=0), tokens.std(dim=0) + 1e-6
    probe = fit_probe((tokens - mean) / deviation, targets)
    accuracies = []
    for split in (training, test):
        tokens, targets = known_only(*split)
        predictions = probe((tokens - mean) / deviation).argmax(dim=-1)
        accuracies.append((predictions == targets).float().mean().item())
    return accuracies


def known_only(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the images whose target is not known."""
    is_known = targets != UNKNOWN
    return tokens[is_known], targets[is_known]


def fit_probe(tokens: Tensor, targets: Tensor) -> nn.Linear:
    """Fit a multinomial logistic regression with a little weight decay."""
    probe = nn.Linear(tokens.shape[1], int(targets.max()) + 1)
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = functional.cross_entropy(probe(tokens), targets) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return probe


def readme(data_summary: str, parameter_count: int, training_summary: str, table: str) -> str:
    """Describe the saved tower for those who find it without the script."""
    geometry = tower_configuration()
    return f"""\
# vit-easyvqa

A CLIP-style vision tower that is small enough to ship with the source. Load it with `transformers`:

```python
tower = CLIPVisionModel.from_pretrained("vit-easyvqa", dtype=torch.float32)
```

It sees the colour and the shape of the one object in an image of easy-VQA, and is of no use for other images.

**Geometry.** {IMAGE_SIZE} x {IMAGE_SIZE} pixels in patches of {geometry.patch_size} x {geometry.patch_size},
{geometry.num_hidden_layers} layers of width {geometry.hidden_size} with {geometry.num_attention_heads} heads,
{parameter_count:,} parameters, stored in half precision.

**Data.** The training images of easy-VQA (the `easy_vqa` package, by Victor Zhou), with the colours and
shapes that the answers to their training questions tell:
{data_summary}.
The rest stay without that target. No test image was used in training.

**Training.** `benchmarks/train_easyvqa_vit.py` fits a softmax over the similarities of the image embedding to
learned embeddings of 24 captions, "a red circle" and so on, and separate colour and shape heads, on the class
tokens after each of the last {SUPERVISED_LAYERS} layers. Shapes are moved about, images mirrored and their brightness
shifted a little. Everything but the tower is thrown away. This run took
{training_summary}.

**Figures.** Accuracy of linear probes (logistic regression, fitted on the training images) on the class
tokens of the residual stream, `hidden_states[k][:, 0]`, of the saved half-precision weights run in single
precision, over the images whose target is known:

{table}

**Licence.** Apache-2.0.
"""


if __name__ == "__main__":
    main()
