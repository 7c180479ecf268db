"""`hf-anomaly card FOLDER`"""

from argparse import Namespace
from pathlib import Path

from ..errors import InputError
from ..parsing import Parser


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly card", "Writes the model card of a saved detector, README.md of its folder, anew. What you wrote in it stays as it is."
    )
    parser.add_argument("folder", help="what training wrote")
    parser.option("license", "licence of the weights, as the Hub spells it: apache-2.0, cc-by-4.0, other …")
    parser.option("dataset_id", "the training images' id on the Hub")
    parser.option(
        "runs", "folders of the same training with other seeds: their results join in a table", nargs="+", default=[], metavar="FOLDER"
    )
    parser.option("repo", "the repository that the card's code loads the detector from, organisation/name. Default: the folder's name")
    return parser.parse(argv)


def run(args: Namespace) -> None:
    from ..cards import write_card
    from ..loading import load_config, load_detector, recorded_results
    from ..training.run_record import first_difference, saved_settings

    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no detector: give the folder that training wrote")
    model, _ = load_detector(args.folder)
    model.require_fitted()
    results = recorded_results(args.folder)
    if args.runs and not (folder / "eval_results.json").is_file():
        raise InputError(f"{folder} holds no eval_results.json, which the results of --runs would stand beside")
    chosen = saved_settings(load_config(args.folder))
    others = []
    for run in args.runs:
        if not (path := Path(run, "eval_results.json")).is_file():
            raise InputError(f"{path} is not there: give a folder that training wrote")
        others.append(recorded_results(run))
        different = first_difference(saved_settings(load_config(run)), chosen)
        if different is not None:
            name, theirs, ours = different
            raise InputError(
                f"{run} is another training than {folder} ({name} is {theirs!r}, not {ours!r}): --runs takes runs that differ in the seed alone"
            )
    write_card(folder, model, results, other_runs=others, repo_id=args.repo, license=args.license, dataset_id=args.dataset_id)
    print(f"written: {folder / 'README.md'}")
