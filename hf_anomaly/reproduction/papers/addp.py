"""The curve of ADDP."""

from ..cells import Row, Section, Table
from ..methods import BASELINES

PAPER = "Ge, Li & Zhang 2023 (denoising pretraining)"
ROWS = tuple(Row("all" if number is None else str(number), "0", number) for number in (16, 64, 256, None))  # ever more training images

TABLES = (
    Table(
        id="addp/1",
        title="Denoising pretraining: AUROC against the number of training images",
        paper=f"{PAPER}: the tables are not available",
        sections=tuple(
            Section(
                dataset,
                protocol,
                ROWS,
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
