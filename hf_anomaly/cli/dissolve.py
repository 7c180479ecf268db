"""`hf-anomaly dissolve DISSOLVER IMAGES`"""

from argparse import Namespace

from ..errors import InputError
from ..files import check_output
from ..parsing import Parser


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly dissolve",
        "Shows what is left of an image when fine features are taken out of it: one row an image, first itself, then dissolved at each t.",
    )
    parser.add_argument("dissolver", help="folder or Hub id of a dissolver, or of a detector that has one")
    parser.add_argument("images", nargs="+", help="image files")
    parser.option(
        "timesteps",
        "diffusion timesteps, or kernel sizes of a blur that has several; larger ones dissolve more (default: five over the dissolver's own range)",
        nargs="+",
        type=int,
    )
    parser.option("output", "the PNG file to write (default: %(default)s)", default="dissolved.png")
    parser.option("seed", "of dissolvers that draw random numbers (default: %(default)s)", type=int, default=0)
    parser.window_option("as in the training of the detector beside the dissolver")
    args = parser.parse(argv)
    check_output("--output", args.output, suffixes=(".png",), apart_from=args.images)
    return args


def run(args: Namespace) -> None:
    import torch

    from ..data import decode_image
    from ..data.formats import parse_window
    from ..dissolving import Dissolver
    from ..visualization import image_grid, write_image

    dissolver = Dissolver.from_pretrained(args.dissolver)
    timesteps = _timesteps(dissolver, args.timesteps)
    processor, tiles = _detector(args.dissolver)
    window = parse_window(args.window) or getattr(processor, "window", None)
    torch.manual_seed(args.seed)
    rows = []
    for file in args.images:
        image = decode_image({"path": file}, file, window)
        pixel_values = (processor or _own_size(image, dissolver))(images=image, return_tensors="pt")["pixel_values"]
        repeated = pixel_values.expand(len(timesteps), -1, -1, -1)
        times = None if dissolver.is_deterministic else torch.tensor(timesteps)
        try:
            rows.append([*pixel_values, *dissolver(repeated, times, tiles)])
        except InputError as error:
            if args.timesteps is None:
                raise InputError(f"{file}: {error}") from error
            if dissolver.symbol != "k":
                raise
            raise InputError(f"--timesteps are the kernel sizes of a {dissolver.kind} dissolver: {error}") from error
    captions = ["original", *("dissolved" if t is None else f"{dissolver.symbol} = {t}" for t in timesteps)]
    write_image(image_grid(rows, captions), args.output)
    print(f"saved: {args.output}")


def _timesteps(dissolver, asked: list[int] | None) -> list[int | None]:
    if dissolver.is_deterministic:
        if asked:
            raise InputError(f"--timesteps: a {dissolver.kind} dissolver has none; leave it out")
        return [None]
    return asked or dissolver.spread_timesteps()


def _detector(name: str) -> tuple:
    """The processor of the detector that the dissolver belongs to, and its number of tiles; None and 1 if there is no detector beside it."""
    from ..hub import find_file
    from ..loading import load_detector

    if find_file(name, "preprocessor_config.json") is None:
        return None, 1
    model, processor = load_detector(name)
    return processor, model.config.tiles


def _own_size(image, dissolver):
    """A processor that leaves the image its size and gives it the dissolver's channels."""
    from ..image_processing import AnomalyImageProcessor

    unet = getattr(dissolver, "unet", None)
    channels = unet.config.in_channels if unet is not None else 1 if image.mode in ("1", "L", "LA") else 3
    processor = AnomalyImageProcessor.for_images(1, channels)
    processor.do_resize = False
    return processor
