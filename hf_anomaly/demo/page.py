"""The page: gradio's components around `analysis`. What comes from elsewhere, such as names, labels and messages, is escaped."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from ..detector import AnomalyDetector
from ..dissolving import Dissolver
from ..errors import NO_GRADIO, InputError
from ..image_processing import AnomalyImageProcessor
from ..visualization import why_no_overlay
from .analysis import RATE_STEP, Verdict, analyse, judge, open_upload, rate_range

if TYPE_CHECKING:
    import gradio

GRADIO = "gradio>=6.31.0,<7"  # as in pyproject.toml
WARNING = (
    "This is no medical device. A score is no diagnosis, and no image that the detector passes is thereby healthy or faultless: "
    "do not decide about a patient by this page."
)
_BLANK = "<p style='opacity: .7'>Drop an image to see its score.</p>"
_STYLE = "<style>#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }</style>"
_CACHE = (300, 900)  # s: how often old uploads and results are deleted, and what counts as old


def import_gradio():
    """gradio, if it is installed.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError(NO_GRADIO) from error
    return gradio


def build_demo(
    model: AnomalyDetector, processor: AnomalyImageProcessor, dissolver: Dissolver | None = None, *, name: str | None = None
) -> gradio.Blocks:
    """The page of a detector: drop an image, see score, p-value, verdict, anomaly map and dissolved versions.

    Another false-alarm rate changes the verdict without running the model again. Uploaded images are deleted after a quarter of an hour.

    Args:
        model: fitted; calibrated for p-value, verdict and map.
        processor: saved with it.
        dissolver: shows what dissolving leaves of the image.
        name: the page's heading; default where the model was loaded from.

    Raises:
        InputError: gradio is not installed.
        NotFittedError: before `fit_reference`.
    """
    gr = import_gradio()
    model.require_fitted()
    model.eval()
    name = name or Path(model.config.name_or_path).name or type(model).__name__
    calibrated = model.calibration.is_calibrated
    lowest, highest, first = rate_range(model)

    def hand_over(upload):
        return upload if upload is None or upload.path else type(image).preprocess(image, upload)

    def blank():
        return None, _BLANK, None, []

    def run(upload, rate):
        if upload is None:
            return blank()
        try:
            analysis = analyse(model, processor, open_upload(upload.path, upload.orig_name, processor.window), dissolver)
        except InputError as error:
            raise gr.Error(_text(str(error)), title="This image cannot be scored", print_exception=False) from error
        score = (analysis.score, analysis.p_value)
        return score, result_html(*score, judge(model, analysis.score, rate) if calibrated else None), analysis.overlay, analysis.dissolved

    def change_rate(score, rate):
        return _BLANK if score is None else result_html(*score, judge(model, score[0], rate))

    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=_CACHE) as demo:
        score = gr.State()
        gr.HTML(_STYLE + heading_html(model, name))
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Image",
                    height=320,
                    elem_id="image",
                    buttons=[],
                )
                # The file as it is, so that `open_upload` decodes it and says what is wrong with it. (gradio writes stubs beside a subclass.)
                image.preprocess = hand_over
                rate = gr.Slider(
                    lowest,
                    highest,
                    first,
                    step=RATE_STEP,
                    label="False-alarm rate",
                    info="The share of normal images that may be flagged.",
                    visible=calibrated,
                    elem_id="rate",
                    buttons=[],
                )
            with gr.Column():
                result = gr.HTML(_BLANK, elem_id="result", container=True, padding=True)
                reason = why_no_overlay(model)
                overlay = gr.Image(
                    label="Anomaly map",
                    height=320,
                    format="png",
                    visible=not reason,
                    interactive=False,
                    elem_id="map",
                    buttons=["fullscreen"],
                )
                if reason:
                    gr.HTML(f"<p style='opacity: .7'>No anomaly map: {_text(reason)}.</p>", elem_id="no-map")
        if dissolver is not None:
            rule = "" if dissolver.is_deterministic else f": the larger {dissolver.symbol}, the less of the image is left"
            gr.HTML(f"<p>Dissolved{rule}</p>")
        gallery = gr.Gallery(
            show_label=False,
            columns=6,
            height=190,
            object_fit="contain",
            format="png",
            visible=dissolver is not None,
            elem_id="dissolved",
            buttons=[],
            interactive=False,
        )
        shown = [score, result, overlay, gallery]
        # First of all the old results go: they must not stand beside another image, least of all one that cannot be scored.
        event = image.change(blank, None, shown, queue=False, api_visibility="private")
        event.then(run, [image, rate], shown, api_visibility="private")
        if calibrated:
            rate.change(change_rate, [score, rate], result, show_progress="hidden", queue=False, api_visibility="private")
    return demo


def heading_html(model: AnomalyDetector, name: str) -> str:
    """Which detector it is, and what for it is normal."""
    config = model.config
    facts = [f"{type(model).__name__}, {config.images_in_words}"]
    if config.normal_label is not None:
        facts.append(f"normal: “{config.normal_label}”")
    n = config.num_calibration_scores
    facts.append(f"calibrated with {n} normal images" if n else "not calibrated")
    return f"<h1 id='name' style='margin: 0'>{_text(name)}</h1><p style='margin: 0; opacity: .7'>{_text(' · '.join(facts))}</p>" + (
        "<p id='warning' style='margin: .8em 0 0; padding: .5em .8em; border-left: .3em solid #f79009; background: #f790091a'>"
        f"<b>{_text(WARNING)}</b></p>"
    )


def result_html(score: float, p_value: float | None, verdict: Verdict | None) -> str:
    """Score, p-value and verdict; the latter two None for a detector that is not calibrated."""
    if verdict is None:
        return (
            f"{_number('score', 'Score', f'{score:.4g}')}"
            "<p>The detector is not calibrated: the score ranks images, but there is neither a p-value nor a verdict.</p>"
        )
    color, word = ("#b42318", "Flagged as anomalous") if verdict.flagged else ("#475467", "Not flagged")  # gray: no all-clear
    side = "above" if verdict.flagged else "not above"
    return (
        f"<p id='verdict' style='margin: 0 0 .8em; padding: .5em .8em; border-radius: .4em; background: {color}; color: white; "
        f"font-size: 1.3em; font-weight: 600'>{word}</p>"
        "<div style='display: flex; gap: 2.5em; flex-wrap: wrap'>"
        f"{_number('score', 'Score', f'{score:.4g}')}{_number('p-value', 'p-value', f'{p_value:.3g}')}"
        f"{_number('threshold', 'Threshold', f'{verdict.threshold:.4g}')}</div>"
        f"<p style='margin: .8em 0 0; opacity: .8'>The score is {side} the threshold for a false-alarm rate of "
        f"{100 * verdict.false_positive_rate:.3g} %. "
        f"About {100 * p_value:.3g} % of normal images score at least so high.</p>"
    )


def _number(id_: str, label: str, value: str) -> str:
    return (
        f"<div><div style='opacity: .7'>{label}</div>"
        f"<div id='{id_}' style='font-size: 1.6em; font-variant-numeric: tabular-nums'>{_text(value)}</div></div>"
    )


def _text(text: str) -> str:
    """Text for gr.HTML, whose values are also templates: `$` and braces are escaped with what HTML itself acts on."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")
