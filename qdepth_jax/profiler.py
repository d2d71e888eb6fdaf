"""A profile of some steps on demand (`--profile_steps=FIRST:END`)."""

from collections.abc import Callable

import jax

from qdepth_jax import workdirs


class Profiler:
    """Traces steps FIRST to END - 1 of this start into WORKDIR/profile, every host its own file.

    Args:
      steps: (FIRST, END) or None for no profile.
      workdir: of the run.
      start: step this start resumes at; a profile whose steps lie before it is skipped with a message.
      say: takes messages.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: str, start: int, say: Callable[[str], None]):
        self._folder, self._say, self._since = workdirs.folder(workdir) / "profile", say, 0
        self._first, self._end = steps or (0, 0)
        self._asked = steps
        if steps and self._end <= start + 1:
            say(f"--profile_steps={self._first}:{self._end}: resumed at step {start}, there is nothing to profile")
            self._first = 0
        elif steps and self._first <= start:
            say(f"--profile_steps={self._first}:{self._end}: resumed at step {start}, the profile starts after it")
            self._first = start + 1

    def before(self, step: int) -> None:
        """Call it in front of every step."""
        if self._since and step == self._end:
            self.close()
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._since = step

    def close(self) -> None:
        """Writes a profile that is still being taken."""
        if self._since:
            jax.profiler.stop_trace()
            self._asked = None
            self._say(f"profile from step {self._since} on in {self._folder}: open it with xprof or TensorBoard")
            self._since = 0
        elif self._asked and self._first:
            self._say(f"--profile_steps={self._first}:{self._end}: the run ended before them, nothing was profiled")
            self._asked = None
