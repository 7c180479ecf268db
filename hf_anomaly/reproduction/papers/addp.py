"""The curve of ADDP."""

from ..cells import Row, Section, Table
from ..methods import BASELINES

PAPER = "Ge, Li & Zhang 2023 (denoising pretraining)"


def image_rows(normal_label: str) -> tuple[Row, ...]:
    """Ever more training images of one normal class."""
    numbers = (16, 64, 256, None)
    return tuple(Row("all" if number is None else str(number), normal_label, number) for number in numbers)


TABLES = (
    Table(
        id="addp/1",
        title="Denoising pretraining: AUROC against the number of training images",
        paper=f"{PAPER}: the tables are not available",
        sections=tuple(
            Section(
                dataset,
                protocol,
                image_rows("0"),
                ("addp_random", "addp_random_longer", "addp_encoder_decoder", "addp_digits", "addp_decoder", *BASELINES),
                with_mean=False,
                row_title="training images",
            )
            for dataset, protocol in (("pneumonia_mnist", "official"), ("fashion_mnist", "balanced"))
        ),
        notes=(
            "On Fashion-MNIST class 0, T-shirt, is the normal one.",
            "The first stage denoises the same training images, in as many steps as the second takes.",
            "Where only the decoder is pretrained, the encoder, frozen meanwhile, comes from denoising scikit-learn's digits.",
        ),
        is_curve=True,
    ),
)
