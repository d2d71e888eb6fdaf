"""What a run will need on chips that are not there: memory, collectives, a roofline, and a search over layouts.

`tools/plan_pod.py` is the command. Nothing here trains; the compiled program is the loop's own train step.
"""
