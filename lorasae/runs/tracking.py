"""--track: sends a run's metrics to trackio too, as they are written to metrics.jsonl.

trackio has wandb's interface and keeps everything on this machine; `trackio show` opens its page.
metrics.jsonl remains the record.
"""
from contextlib import contextmanager

from lorasae.errors import InputError


@contextmanager
def tracked(run):
    """Inside the `with`, tracks the run under its folder's path if its config has `track`.

    A resumed run continues in the same trackio run. With several processes, only the first tracks.
    """
    if not (run.config.track and run.writes):
        yield
        return
    try:
        import trackio
    except ImportError:
        raise InputError("--track needs trackio: pip install trackio") from None
    trackio.init(project="lorasae", name=str(run.folder.resolve()), resume="allow",
                 config=run.config.to_json())
    run.track = trackio.log
    try:
        yield
    finally:
        trackio.finish()
