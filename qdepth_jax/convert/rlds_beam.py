"""The same conversion as an Apache Beam pipeline, for data that outgrows one machine.

    shards -> Reshuffle -> convert_shard -> all results -> finish

The function per shard is that of the local pool, so the records are the same to the byte. Beam may try an element
again or twice at once: a shard appears under its name only when it is complete, and every try writes the same. The
workers need to see the data set, the sidecars and the output under the same paths (a shared file system), and
qdepth_jax installed (--beam_arg=--setup_file=... or a container image).
"""

from collections.abc import Sequence
from typing import Any

from qdepth_jax import errors
from qdepth_jax.convert import rlds, rlds_claim, rlds_run, rlds_shard


def check_installed() -> None:
    """Raises UserError where Beam is missing."""
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise errors.UserError(
            f"--runner needs Apache Beam ({error}): pip install -e '.[convert]', or leave out --runner"
        ) from error


def run(plan: rlds.Plan, runner: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the pipeline to its end; returns the counts as `rlds_run.finish` does.

    Args:
      plan: the conversion; its output folder must be claimed.
      runner: Beam's name of the runner.
      arguments: options of the pipeline, as on Beam's command line.

    Raises:
      UserError: no such runner. What a worker raises comes out as Beam wraps it.
    """
    import apache_beam as beam
    from apache_beam.options import pipeline_options

    try:
        options = pipeline_options.PipelineOptions([f"--runner={runner}", *arguments], save_main_session=False)
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError, AttributeError) as error:
        raise errors.UserError(f"--runner={runner}: {error}") from error
    results = (
        pipeline
        | "shards" >> beam.Create(list(plan.tasks), reshuffle=False)
        # Without it Beam fuses everything into one stage on one worker.
        | beam.Reshuffle()
        | "convert" >> beam.Map(rlds_shard.convert_shard)
    )
    results | "all" >> beam.combiners.ToList() | "metadata" >> beam.Map(lambda found: rlds_run.finish(plan, found))
    state = pipeline.run().wait_until_finish()
    if str(state) != "DONE":
        raise errors.UserError(f"--runner={runner}: the pipeline ended as {state}; run the same command again")
    return rlds_claim.read_notes(plan.output, plan.target.notes)["counts"]
