"""`hf-anomaly space MODEL SPACE`"""

from argparse import Namespace

from ..parsing import Parser


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly space", "Makes a Space of the Hub with the demo page of a detector on the Hub, and pushes it in one commit."
    )
    parser.add_argument("model", help="the detector's Hub id")
    parser.add_argument("space", help="the Space, organisation/name or name; made if it is not there")
    parser.option("revision", "branch, tag or commit of the detector")
    parser.option("private", "make a new Space a private one", action="store_true")
    parser.option("local", "only write the Space's files, to this folder")
    return parser.parse(argv)


def run(args: Namespace) -> None:
    from ..demo import make_space

    place = make_space(
        args.model, args.space, revision=args.revision, private=args.private or None, folder=args.local, push=args.local is None
    )
    print(f"{'pushed' if args.local is None else 'written'}: {place}")
