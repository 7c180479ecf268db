"""`hf-anomaly push FOLDER REPO`"""

from argparse import Namespace
from pathlib import Path

from ..errors import InputError
from ..parsing import Parser


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly push", "Puts a detector or dissolver on the Hugging Face Hub, whole and in one commit. Log in first: hf auth login"
    )
    parser.add_argument("folder", help="what training wrote")
    parser.add_argument("repo", help="the repository, organisation/name or name; made if it is not there")
    parser.option("private", "make a new repository a private one", action="store_true")
    parser.option("revision", "branch to push to; made if it is not there")
    parser.option("create_pr", "propose it in a pull request", action="store_true")
    parser.option("git_tag", "also tag the commit, such as v1")
    parser.option("message", "the commit's message", default="Upload model")
    return parser.parse(argv)


def run(args: Namespace) -> None:
    from ..hub import push_folder

    folder = Path(args.folder)
    _check(folder)
    commit = push_folder(
        folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        git_tag=args.git_tag,
        message=args.message,
    )
    print(f"pushed: {commit}")


def _check(folder: Path) -> None:
    """Refuses a folder that nobody could use, and gives a detector without a card one."""
    from ..saving import holds_dissolver

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the one that training wrote")
    if holds_dissolver(folder):
        from ..dissolving import Dissolver

        Dissolver.from_pretrained(folder)
        return
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no detector and no dissolver: give the folder that training wrote")
    if (folder / "pretraining.json").exists():  # a first stage: it scores nothing yet
        return
    from ..cards import write_card
    from ..loading import load_detector

    model, _ = load_detector(str(folder))
    model.require_fitted()
    if not (folder / "README.md").exists():
        write_card(folder, model)
