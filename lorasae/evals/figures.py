"""The pictures of the evaluations, RUN_DIR/eval-NAME.png, where matplotlib is installed (it is optional).

    python eval.py RUN_DIR --suite tokens           evaluates and draws
    python eval.py RUN_DIR --suite tokens --draw    draws again, from RUN_DIR/eval-tokens.json
"""
import io

from lorasae.io.files import write_bytes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")        # Okabe & Ito's, for any eye


def save_figure(draw, numbers, path, again=None):
    """draw(numbers, figure) -> a PNG at path; without matplotlib one line says what to do.

    again: the command that draws it again, if that is not eval.py.
    """
    try:
        from matplotlib import cycler, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        again = again or f"python eval.py {path.parent} --suite {path.stem.removeprefix('eval-')} --draw"
        print(f"no picture: pip install matplotlib && {again}")
        return
    png = io.BytesIO()
    with rc_context({"axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
                     "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(layout="constrained")
        draw(numbers, figure)
        figure.savefig(png, format="png", dpi=150)
    write_bytes(path, png.getvalue())
    print(f"{path}")
